"""HunyuanVideo 13B (2412.03603): finetuning of the published weights, and what `vgjax.plan` is asked about.

    python -m vgjax.train --config configs/hunyuan_video.py --config.weights=CONVERTED --workdir runs/hunyuan \
        --config.data.path=videos --config.lora.rank=32
    python -m vgjax.plan --config configs/hunyuan_video.py --topology v5p:4x4x4 --job sample --batch 8

CONVERTED is what `vgjax.convert` made of the published folder: the transformer is `mmdit`. The clips and their captions
are encoded once, by the VAE (`hunyuan_vae`) and the text encoders (`llama`, `clip`). Without `lora.rank` the whole
transformer goes on learning; it is told the guidance scale `objective.guidance`. `configs/hunyuan_video.py:own` takes
whatever size CONVERTED holds.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "13b") -> ConfigDict:
    if arg not in ("13b", "own"):
        raise ValueError(f"configs/hunyuan_video.py:{arg} is unknown: use 13b or own")
    config = ConfigDict()
    config.seed = 0
    config.precision = "auto"
    config.weights = "{workdir}/../converted"
    config.component = "transformer"
    config.lora = dict(rank=0, alpha=0.0)
    config.data = dict(
        kind="folder", path="videos", frames=129, size=(720, 1280), fps=24.0, workers=8, drop_caption=0.1
    )
    config.latents = "{workdir}/../latents"
    config.layout = dict(kind="ulysses", devices=0, data=0, fsdp=0, sequence=0, tensor=0)
    config.objective = dict(kind="finetune", family="hunyuan_video", guidance=1.0, bins=4)
    config.model = dict(kind="mmdit", remat="full") | ({} if arg == "own" else {"size": arg})
    config.time = dict(kind="logit_normal", loc=0.0, scale=1.0)
    config.shift = dict(factor=7.0)
    config.optim = dict(
        kind="adamw", lr=1e-5, schedule="constant", warmup=100, weight_decay=0.01, clip=1.0, ema=0.9999, accumulate=1
    )
    config.train = dict(steps=10_000, batch=64, log_every=10, save_every=500, keep_last=3, watchdog=1800.0)
    config.sample = dict(steps=50, cfg=1.0, guidance=6.0)
    return config
