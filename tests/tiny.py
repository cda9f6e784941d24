"""The smallest real training, for tests: `--config tests/tiny.py:vae`, `:dit` and `:frozen`, seconds each.

`frozen` is a flow on a published VAE and two published encoders, whose folders its flags name.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "vae") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.precision = "float32"
    config.data = dict(
        kind="shapes",
        world="small",
        path="{workdir}/../data",
        count=24,
        held_out=8,
        frames=5,
        size=(16, 16),
        fps=8.0,
        workers=0,
        max_bad=0.1,
    )
    config.layout = dict(kind="dp", devices=1)
    config.optim = dict(
        kind="adamw", lr=1e-3, schedule="cosine", warmup=2, weight_decay=0.01, clip=1.0, ema=0.9, accumulate=1
    )
    config.train = dict(steps=6, batch=4, log_every=1, image_every=6, save_every=2, max_dropped=10)
    config.evaluate = dict(clips=4)
    if arg == "vae":
        config.objective = dict(kind="vae", weights=(("recon", 1.0), ("kl", 1e-4)))
        config.model = dict(
            kind="causal_vae",
            width=4,
            multipliers=(1, 2, 2),
            blocks=1,
            time=(2, 2),
            space=(2, 1),
            patch=2,
            latent_channels=4,
        )
        return config
    config.objective = dict(kind="flow", bins=4)
    config.model = dict(
        kind="mmdit", dim=16, heads=2, double_blocks=1, single_blocks=1, refiner_blocks=1, rope_dims=(2, 2, 4)
    )
    config.tokenizer = dict(kind="words", length=8, buckets=64)
    config.text = dict(dim=16, blocks=1, heads=2, pooled=16)
    config.time = dict(kind="logit_normal", loc=0.0, scale=1.0)
    config.shift = dict(factor=1.0)
    config.vae = "{workdir}/../vae"
    config.latents = "{workdir}/../latents"
    config.data.drop_caption = 0.1
    config.evaluate.prompts = 4
    config.sample = dict(steps=2, cfg=2.0, batch=4)
    if arg == "frozen":
        del config.tokenizer
        config.data.size = (32, 32)
        config.text = dict(kind="frozen", path="", encoders=("text_encoder", "text_encoder_2"), dim=16, pooled=16)
    return config
