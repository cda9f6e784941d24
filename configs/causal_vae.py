"""A causal VAE on your own folder of videos, at the sizes of `vgjax.models.causal_vae.SIZES`.

    python -m vgjax.train --config configs/causal_vae.py:small --workdir runs/b/vae --config.data.path=FOLDER

The MM-DiT of configs/mmdit.py is then trained on its latents, in the workdir beside it.
"""

from ml_collections import ConfigDict

# size: (frames, (height, width), batch, layout)
SHAPES = {
    "small": (17, (128, 128), 16, "fsdp"),
    "4x8x8": (17, (256, 256), 64, "fsdp"),
}


def get_config(arg: str = "small") -> ConfigDict:
    if arg not in SHAPES:
        raise ValueError(f"configs/causal_vae.py:{arg} is unknown: use one of {', '.join(SHAPES)}")
    frames, size, batch, layout = SHAPES[arg]
    config = ConfigDict()
    config.seed = 0
    config.precision = "auto"
    config.data = dict(kind="folder", path="videos", frames=frames, size=size, fps=24.0, workers=8, max_bad=0.01)
    config.layout = dict(kind=layout, devices=0, data=0, fsdp=0, sequence=0, tensor=0)
    config.objective = dict(kind="vae", weights=(("recon", 1.0), ("kl", 1e-6)))
    config.model = dict(kind="causal_vae", size=arg)
    config.optim = dict(
        kind="adamw", lr=1e-4, schedule="constant", warmup=1000, weight_decay=0.0, clip=1.0, ema=0.999, accumulate=1
    )
    config.train = dict(
        steps=100_000, batch=batch, log_every=20, image_every=2000, save_every=1000, keep_last=3, keep_every=10_000
    )
    config.evaluate = dict(clips=64, path="")
    return config
