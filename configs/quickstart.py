"""The quickstart: a causal VAE and an MM-DiT for a small world of moving shapes, minutes on two CPU cores.

    python -m vgjax.train --config configs/quickstart.py:vae --workdir runs/quickstart/vae
    python -m vgjax.train --config configs/quickstart.py:dit --workdir runs/quickstart/dit

The world is rendered once to H.264 files beside the workdirs and read back as any folder of videos would be.
"""

from ml_collections import ConfigDict


def data() -> dict:
    return dict(
        kind="shapes",
        world="small",
        path="{workdir}/../data",
        count=2000,
        held_out=128,
        frames=9,
        size=(32, 32),
        fps=8.0,
        workers=0,
        max_bad=0.1,
    )


def get_config(arg: str = "dit") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.precision = "auto"
    config.data = data()
    config.layout = dict(kind="dp", devices=1)  # batches of 4 divide over no more
    if arg == "vae":
        config.objective = dict(kind="vae", weights=(("mse", 1.0), ("kl", 1e-6)))
        config.model = dict(kind="causal_vae", size="tiny")
        config.optim = dict(
            kind="muon", lr=2.5e-3, schedule="cosine", warmup=20, final=0.02, clip=1.0, ema=0.99, accumulate=1
        )
        config.train = dict(
            steps=2400,
            batch=4,
            log_every=20,
            image_every=1200,
            save_every=400,
            keep_last=3,
            keep_every=0,
            max_dropped=10,
        )
        config.evaluate = dict(clips=64, path="")
    elif arg == "dit":
        config.objective = dict(kind="flow", precondition=True, bins=4)
        config.model = dict(kind="mmdit", size="quickstart")
        config.tokenizer = dict(kind="words", length=12)
        config.text = dict(dim=128, blocks=1, heads=4, pooled=128)
        config.time = dict(kind="uniform")
        config.shift = dict(factor=3.0)
        config.vae = "{workdir}/../vae"
        config.latents = "{workdir}/../latents"
        config.data.drop_caption = 0.1
        config.optim = dict(
            kind="muon",
            lr=4e-3,
            iterations=3,
            schedule="cosine",
            warmup=50,
            final=0.0,
            clip=1.0,
            ema=0.99,
            accumulate=1,
        )
        config.train = dict(
            steps=4000,
            batch=16,
            log_every=20,
            image_every=1200,
            evaluate_every=0,
            save_every=300,
            keep_last=3,
            keep_every=0,
            max_dropped=10,
        )
        config.evaluate = dict(clips=64, prompts=100, path="")
        config.sample = dict(steps=24, cfg=2.0)
    else:
        raise ValueError(f"configs/quickstart.py:{arg} is unknown: use vae or dit")
    return config
