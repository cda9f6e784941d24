"""HunyuanVideo 13B (2412.03603) at its published shapes: what `vgjax.plan` is asked about.

    python -m vgjax.plan --config configs/hunyuan_video.py --topology v5p:4x4x4 --job sample --batch 8

Its weights come by `vgjax.convert` and are sampled by `vgjax.sample --checkpoint CONVERTED`: the transformer is
`mmdit`, the VAE `hunyuan_vae`, the prompts are read by `llama` and `clip`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.precision = "auto"
    config.data = dict(kind="folder", path="videos", frames=129, size=(720, 1280), fps=24.0, workers=8)
    config.layout = dict(kind="ulysses", devices=0, data=0, fsdp=0, sequence=0, tensor=0)
    config.objective = dict(kind="flow", precondition=False, bins=4)
    config.model = dict(kind="mmdit", size="13b")
    config.tokenizer = dict(kind="words", length=256, buckets=32768)
    config.text = dict(dim=4096, blocks=0, heads=32, pooled=768)
    config.time = dict(kind="logit_normal", loc=0.0, scale=1.0)
    config.shift = dict(factor=7.0)
    config.vae = "{workdir}/../vae"
    config.latents = "{workdir}/../latents"
    config.optim = dict(
        kind="adamw", lr=1e-5, schedule="constant", warmup=100, weight_decay=0.01, clip=1.0, ema=0.9999, accumulate=1
    )
    config.train = dict(
        steps=10_000, batch=64, log_every=10, image_every=500, save_every=500, keep_last=3, watchdog=1800.0
    )
    config.evaluate = dict(clips=64, path="")
    config.sample = dict(steps=50, cfg=1.0, guidance=6.0)
    return config
