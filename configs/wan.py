"""Wan 2.1 and 2.2 (2503.20314): finetuning of published weights, and what `vgjax.plan` is asked about.

    python -m vgjax.train --config configs/wan.py:wan2.1-t2v-1.3b --config.weights=CONVERTED --workdir runs/wan \
        --config.data.path=videos --config.lora.rank=32
    python -m vgjax.plan --config configs/wan.py:wan2.1-t2v-14b --topology v5p:2x2x1 --job sample --batch 1

CONVERTED is what `vgjax.convert` made of the published folder: the transformer is `crossdit`. The clips and their
captions are encoded once, by the VAE (`wan_vae`) and the text encoder (`t5`) in it. Without `lora.rank` the whole
transformer goes on learning. Of two experts (2.2) `--config.component=transformer_2` is that of low noise.
`configs/wan.py:own` takes whatever size CONVERTED holds.
"""

from ml_collections import ConfigDict

ONE = dict(steps=50, cfg=5.0)
# size of the transformer: (frames, (height, width), fps, shift, how it is sampled)
SHAPES = {
    "wan2.1-t2v-1.3b": (81, (480, 832), 16.0, 5.0, ONE),
    "wan2.1-t2v-14b": (81, (720, 1280), 16.0, 5.0, ONE),
    "wan2.2-t2v-a14b": (81, (720, 1280), 16.0, 12.0, dict(steps=40, cfg=(4.0, 3.0))),
    "own": (81, (480, 832), 16.0, 5.0, {}),
}


def get_config(arg: str = "wan2.1-t2v-14b") -> ConfigDict:
    if arg not in SHAPES:
        raise ValueError(f"configs/wan.py:{arg} is unknown: use one of {', '.join(SHAPES)}")
    frames, size, fps, shift, sample = SHAPES[arg]
    config = ConfigDict()
    config.seed = 0
    config.precision = "auto"
    config.weights = "{workdir}/../converted"
    config.component = "transformer"
    config.lora = dict(rank=0, alpha=0.0)
    config.data = dict(kind="folder", path="videos", frames=frames, size=size, fps=fps, workers=8, drop_caption=0.1)
    config.latents = "{workdir}/../latents"
    config.layout = dict(kind="ulysses", devices=0, data=0, fsdp=0, sequence=0, tensor=0)
    config.objective = dict(kind="finetune", family="wan", bins=4)
    config.model = dict(kind="crossdit", remat="full") | ({} if arg == "own" else {"size": arg})
    config.time = dict(kind="logit_normal", loc=0.0, scale=1.0)
    config.shift = dict(factor=shift)
    config.optim = dict(
        kind="adamw", lr=1e-5, schedule="constant", warmup=100, weight_decay=0.01, clip=1.0, ema=0.9999, accumulate=1
    )
    config.train = dict(steps=10_000, batch=64, log_every=10, save_every=500, keep_last=3, watchdog=1800.0)
    config.sample = dict(sample)
    return config
