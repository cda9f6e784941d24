"""The full world of moving shapes: six colours, four shapes, seven motions, four backgrounds, one or two objects.

    VGJAX_CONFIG=configs/shapes.py launch/quickstart.sh runs/shapes
    python -m vgjax.train --config configs/shapes.py:dit --workdir runs/shapes/dit

Minutes on a GPU, up to an hour and a half on two CPU cores; interrupted and started again, it continues. Prompt
accuracy is measured as it trains (`evaluate/...` in TensorBoard, `evaluations.jsonl` in the workdir). Samples have
9, 21, 33, ... frames: a patch spans three latent frames.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "dit") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.precision = "auto"
    config.data = dict(
        kind="shapes",
        world="full",
        path="{workdir}/../data",
        count=40000,
        held_out=128,
        frames=9,
        size=(32, 32),
        fps=8.0,
        workers=0,
        max_bad=0.1,
    )
    config.layout = dict(kind="dp", devices=1)  # batches of 4 divide over no more
    if arg == "vae":
        config.objective = dict(kind="vae", weights=(("mse", 1.0), ("kl", 1e-6)))
        config.model = dict(kind="causal_vae", size="tiny")
        config.optim = dict(
            kind="muon", lr=2.5e-3, schedule="cosine", warmup=20, final=0.02, clip=1.0, ema=0.99, accumulate=1
        )
        config.train = dict(
            steps=5000,
            batch=4,
            log_every=50,
            image_every=2500,
            evaluate_every=0,
            save_every=500,
            keep_last=3,
            keep_every=0,
            max_dropped=10,
        )
        config.evaluate = dict(clips=64, path="")
    elif arg == "dit":
        config.objective = dict(kind="flow", precondition=True, bins=4)
        # A token is one place over all three latent frames: 64 tokens a clip, each twice as fine in space as the 48 of
        # patch (1, 2, 2), and half the quickstart's width.
        config.model = dict(kind="mmdit", size="quickstart", dim=128, heads=4, patch=(3, 1, 1))
        config.tokenizer = dict(kind="words", length=20)
        # A pooled caption says what is in the picture, not which object does what: the narrower it is, the sooner
        # attention learns that (benchmarks/binding.py tells).
        config.text = dict(dim=128, blocks=1, heads=4, pooled=4)
        # What is where is decided while most of the picture is noise: half of the shifted times lie in 0.14 to 0.41.
        config.time = dict(kind="logit_normal", loc=0.0, scale=1.1)
        config.shift = dict(factor=3.0)
        config.vae = "{workdir}/../vae"
        config.latents = "{workdir}/../latents"
        config.data.drop_caption = 0.1
        config.optim = dict(
            kind="muon",
            lr=4e-3,
            iterations=3,
            schedule="cosine",
            warmup=100,
            final=0.0,
            clip=1.0,
            ema=0.999,
            accumulate=1,
        )
        config.train = dict(
            steps=30000,
            batch=16,
            log_every=50,
            image_every=10000,
            evaluate_every=5000,
            save_every=500,
            keep_last=3,
            keep_every=0,
            max_dropped=10,
        )
        config.evaluate = dict(clips=64, prompts=100, path="")
        config.sample = dict(steps=64, stepper="churn", cfg=2.5, interval=(0.0, 0.6))
    else:
        raise ValueError(f"configs/shapes.py:{arg} is unknown: use vae or dit")
    return config
