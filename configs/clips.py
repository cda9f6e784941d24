"""A handful of real clips, to be remembered: a check that the whole path works on footage, and a start for your own.

    python -m vgjax.train --config configs/clips.py:vae --workdir runs/clips/vae --config.data.path=FOLDER
    python -m vgjax.train --config configs/clips.py:dit --workdir runs/clips/dit --config.data.path=FOLDER
    python -m vgjax.evaluate --checkpoint runs/clips/dit

Windows of 17 frames at 64x64, drawn anew at every step. Evaluation asks whether the sample of each caption lies
nearest, in latent space, to its own clip.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "dit") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.precision = "auto"
    config.data = dict(kind="folder", path="videos", frames=17, size=(64, 64), fps=8.0, workers=1, max_bad=0.1)
    config.layout = dict(kind="dp", devices=0)
    config.evaluate = dict(clips=64, path="")
    if arg == "vae":
        config.objective = dict(kind="vae", weights=(("mse", 1.0), ("kl", 1e-6)))
        config.model = dict(kind="causal_vae", size="tiny")
        config.optim = dict(
            kind="muon", lr=2.5e-3, schedule="cosine", warmup=20, final=0.02, clip=1.0, ema=0.99, accumulate=1
        )
        config.train = dict(steps=250, batch=8, log_every=10, image_every=250, save_every=125, max_dropped=10)
    elif arg == "dit":
        config.objective = dict(kind="flow", precondition=True, bins=4)
        config.model = dict(kind="mmdit", size="quickstart")
        config.tokenizer = dict(kind="words", length=32)
        config.text = dict(dim=128, blocks=1, heads=4, pooled=128)
        config.time = dict(kind="uniform")
        config.shift = dict(factor=3.0)
        config.vae = "{workdir}/../vae"
        config.latents = ""
        config.data.drop_caption = 0.1
        config.optim = dict(
            kind="muon", lr=3e-3, schedule="cosine", warmup=20, final=0.0, clip=1.0, ema=0.99, accumulate=1
        )
        config.train = dict(steps=300, batch=8, log_every=10, image_every=300, save_every=150, max_dropped=10)
        config.evaluate.nearest = True
        config.sample = dict(steps=30, cfg=2.0)
    else:
        raise ValueError(f"configs/clips.py:{arg} is unknown: use vae or dit")
    return config
