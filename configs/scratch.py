"""A video model from scratch on a published VAE and published text encoders, which stay as they are.

    python -m vgjax.convert --from FOLDER --to CONVERTED --only vae text_encoder
    python -m vgjax.train --config configs/scratch.py --workdir runs/scratch --config.vae=CONVERTED \\
        --config.text.path=CONVERTED --config.data.path=videos

Latents and what the encoders make of the captions are encoded once, at the first start or, for jobs of several
processes, by `vgjax.encode` with the same flags. `configs/scratch.py:SIZE` is a size of the MM-DiT. Encoders are models
of the folder (`--config.text.encoders="('text_encoder','text_encoder_2')"`), each a stream of tokens, a pooled vector,
or both; from several folders: `config.text.encoders = dict(t5=dict(path=..., component="text_encoder", length=256))`.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "b") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.precision = "auto"
    config.data = dict(
        kind="folder", path="videos", frames=49, size=(256, 256), fps=12.0, workers=8, max_bad=0.1, drop_caption=0.1
    )
    config.layout = dict(kind="fsdp", devices=0)
    config.objective = dict(kind="flow", precondition=True, bins=4)
    config.model = dict(kind="mmdit", size=arg)
    config.vae = "{workdir}/../converted"
    config.text = dict(kind="frozen", path="{workdir}/../converted", encoders=("text_encoder",), dim=768, pooled=768)
    config.latents = "{workdir}/../latents"
    config.time = dict(kind="logit_normal", loc=0.0, scale=1.0)
    config.shift = dict(factor=3.0)
    config.optim = dict(
        kind="adamw", lr=1e-4, schedule="constant", warmup=1000, weight_decay=0.01, clip=1.0, ema=0.9999, accumulate=1
    )
    config.train = dict(
        steps=100_000, batch=64, log_every=50, image_every=5000, evaluate_every=5000, save_every=1000, watchdog=1800.0
    )
    config.evaluate = dict(clips=64, path="")
    config.sample = dict(steps=40, cfg=5.0)
    return config
