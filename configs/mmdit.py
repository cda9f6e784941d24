"""The MM-DiT at research and production sizes, on your own folder of videos; what `vgjax.plan` is asked about.

    python -m vgjax.plan --config configs/mmdit.py:13b --topology v5p:4x4x4 --layouts all
    python -m vgjax.train --config configs/mmdit.py:b --workdir runs/b/dit --config.data.path=FOLDER

Sizes are those of `vgjax.models.mmdit.SIZES`. A VAE trained by configs/causal_vae.py is expected at `config.vae`.
"""

from ml_collections import ConfigDict

# size: (frames, (height, width), batch, layout). 129 frames of 720x1280 are HunyuanVideo's 118,800 tokens.
SHAPES = {
    "s": (17, (128, 128), 64, "fsdp"),
    "b": (17, (256, 256), 64, "fsdp"),
    "l": (33, (256, 448), 64, "fsdp"),
    "2b": (65, (480, 832), 64, "fsdp"),
    "13b": (129, (720, 1280), 64, "ulysses"),
}
TEXT = {"13b": dict(dim=4096, blocks=0, heads=32, pooled=768)}


def get_config(arg: str = "b") -> ConfigDict:
    if arg not in SHAPES:
        raise ValueError(f"configs/mmdit.py:{arg} is unknown: use one of {', '.join(SHAPES)}")
    frames, size, batch, layout = SHAPES[arg]
    config = ConfigDict()
    config.seed = 0
    config.precision = "auto"
    config.data = dict(
        kind="folder", path="videos", frames=frames, size=size, fps=24.0, workers=8, max_bad=0.01, drop_caption=0.1
    )
    config.layout = dict(kind=layout, devices=0, data=0, fsdp=0, sequence=0, tensor=0)
    config.objective = dict(kind="flow", precondition=False, bins=4)
    config.model = dict(kind="mmdit", size=arg)
    config.tokenizer = dict(kind="words", length=256, buckets=32768)
    config.text = TEXT.get(arg, dict(dim=512, blocks=4, heads=8, pooled=512))
    config.time = dict(kind="logit_normal", loc=0.0, scale=1.0)
    config.shift = dict(factor=7.0 if arg == "13b" else 3.0)
    config.vae = "{workdir}/../vae"
    config.latents = "{workdir}/../latents"
    config.optim = dict(
        kind="adamw", lr=1e-4, schedule="constant", warmup=1000, weight_decay=0.01, clip=1.0, ema=0.9999, accumulate=1
    )
    config.train = dict(steps=100_000, batch=batch, log_every=20, image_every=2000, save_every=1000, watchdog=1800.0)
    config.train.update(keep_last=3, keep_every=10_000)
    config.evaluate = dict(clips=64, path="")
    config.sample = dict(steps=50, cfg=6.0)
    return config
