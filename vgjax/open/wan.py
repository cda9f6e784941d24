"""Wan 2.1 and 2.2 (2503.20314): umT5 reads the prompt, guidance is computed, two experts share the times in 2.2.

An image as first frame: in the channels behind the latents, with a mask, and for 2.1 in its CLIP's tokens; or, where
times are per frame (2.2's 5B), as the first latent frame itself, at the time of clean data.
"""

import dataclasses
import html
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import repeat
from PIL import Image

from vgjax.errors import UserError
from vgjax.flow import schedule
from vgjax.flow.path import reverse
from vgjax.flow.sampling import Settings
from vgjax.flow.steppers import Velocity
from vgjax.nn.codec import encode_stream, from_uint8, stats_of, to_unit
from vgjax.open import folders
from vgjax.open.stage import Stage
from vgjax.open.store import Store
from vgjax.open.texts import Encoder, Frozen
from vgjax.parallel import sharding
from vgjax.parallel.distributed import fetch
from vgjax.typing import Array, Context, Float, Known, Module, PyTree, Tokens, UInt8

LENGTH, IMAGE = 512, "image"  # tokens of a prompt; the stream of an image's tokens
# What the authors guide away from, published with the models.
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


def settings(store: Store, **given: Any) -> Settings:
    """Those published: 50 steps, scale 5; with two experts 40 steps and the scales of high and low noise."""
    if "guidance" in given:
        raise UserError("--guidance is told to guidance-distilled models alone, and no Wan is one: give --cfg instead")
    image = "ImageToVideo" in store.index["_class_name"]
    video = dict(frames=81, size=(480, 832), fps=16.0)
    base = Settings(steps=50, cfg=5.0, stepper=schedule.stepper(store.scheduler), batch=1, **video)
    if two(store):
        base = dataclasses.replace(base, steps=40, cfg=(3.5, 3.5) if image else (4.0, 3.0), size=(720, 1280))
    elif store.index.get("expand_timesteps"):
        base = dataclasses.replace(base, frames=121, size=(704, 1280), fps=24.0)
    use = dataclasses.replace(base, **given)
    return dataclasses.replace(use, cfg=use.cfg * 2) if two(store) and len(use.cfg) == 1 else use


def two(store: Store) -> bool:
    """Whether a second expert takes over at low noise."""
    return store.index.get("boundary_ratio") is not None and store.has("transformer_2")


def clean(text: str) -> str:
    """A prompt as the models were trained to see it: broken Unicode mended, HTML undone, white space single."""
    import ftfy  # here: a sixth of a second, for whoever reads a prompt

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text))).strip()).strip()


def stages(store: Store, use: Settings) -> list[Stage]:
    """The expert of high noise down to the boundary, then that of low noise; or one model for all times."""
    whole = schedule.published(store.scheduler, use.steps, use.shift)
    if not two(store):
        return [Stage("transformer", whole, use.cfg[0])]
    # A level of just the boundary is of the first expert, also where a time in fp32 has moved it by a hair.
    first = int(np.sum(1.0 - whole.told[:-1] >= store.index["boundary_ratio"] - 1e-6))
    halves = slice(first + 1), slice(first, None)
    names = "transformer", "transformer_2"
    return [
        Stage(name, schedule.Schedule(whole.times[half], whole.told[half]), scale)
        for name, half, scale in zip(names, halves, use.cfg, strict=True)
    ]


def conditioner(store: Store) -> Frozen:
    """umT5's states of the prompts."""
    return Frozen({"text": (store, Encoder("text_encoder", LENGTH))}, clean)


def condition(store: Store, image: np.ndarray | None, frames: int, size: tuple[int, int]) -> Context:
    """What of an image the model is given: channels behind the latents, a stream of tokens, or the first latent
    frame."""
    takes = "ImageToVideo" in store.index["_class_name"]
    if takes != (image is not None):
        raise UserError(
            f"{store.folder} {'starts from an image: give --image' if takes else 'takes no image: leave --image out'}"
        )
    if image is None:
        return Context({})
    resized = Image.fromarray(image).resize(size[::-1], Image.Resampling.LANCZOS)
    pixels = from_uint8(jnp.asarray(resized)[None, None])
    each = store.index.get("expand_timesteps")
    video = np.asarray(pixels) if each else np.pad(pixels, ((0, 0), (0, frames - 1), *((0, 0),) * 3))
    with sharding.within(store.where), store.model("vae") as (vae, params, meta):
        mean, _ = encode_stream(vae, params, sharding.whole(video, store.where), vae.time_factor)
        mean, behind = fetch(mean), vae.time_factor
    z = np.asarray(to_unit(jnp.asarray(mean), stats_of(meta["stats"])))
    if each:
        shape = vae.latent_shape(frames, *size)
        rest = np.zeros((1, shape[0] - 1, *shape[1:]), np.float32)
        clean_frames = (np.arange(shape[0]) == 0).astype(np.float32)
        known = Known(np.concatenate([z, rest], axis=1), repeat(clean_frames, "t -> 1 t 1 1 1"))
        return Context({}, known=known)
    shown = (np.arange(z.shape[1]) == 0).astype(np.float32)
    mask = repeat(shown, "t -> 1 t h w r", h=z.shape[2], w=z.shape[3], r=behind)
    given = Context({}, channels=np.concatenate([mask, z], axis=-1))
    if store.has("image_encoder"):
        blocks = store.published("image_encoder")["num_hidden_layers"] - 1
        with (
            sharding.within(store.where),
            store.model("image_encoder", blocks=blocks, norm=False) as (model, params, _),
        ):
            tokens_of = jax.jit(model.apply)({"params": params}, sharding.whole(seen(store, image), store.where))
            tokens = fetch(tokens_of).astype(np.float32)
        given = given._replace(text={IMAGE: Tokens(tokens, np.ones(tokens.shape[:2], bool))})
    return given


def seen(store: Store, image: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "1 i j 3"]:
    """An image as its encoder wants it, by the preprocessor_config.json: resized, cut to the middle, normalised."""
    config = folders.read_json(store.folder / "image_processor" / "preprocessor_config.json")
    picture, short = Image.fromarray(image), config["size"]["shortest_edge"]
    width, height = picture.size
    scale = short / min(width, height)
    picture = picture.resize(
        (max(short, int(width * scale)), max(short, int(height * scale))), Image.Resampling(config["resample"])
    )
    high, wide = (config["crop_size"][side] for side in ("height", "width"))
    top, left = (picture.height - high) // 2, (picture.width - wide) // 2
    picture = picture.crop((left, top, left + wide, top + high))
    x = np.asarray(picture, np.float32) * config.get("rescale_factor", 1 / 255)
    return ((x - np.array(config["image_mean"], np.float32)) / np.array(config["image_std"], np.float32))[None]


def velocity(model: Module, variables: PyTree, context: Context) -> Velocity:
    """The velocity of a Context. The zeros behind a text are attended to."""
    c, known = context.text["text"].c, context.known
    rest = (None, None, context.text[IMAGE].c) if IMAGE in context.text else ()

    def network(x: Float[Array, "b t h w z"], t: Float[Array, "..."], memory: PyTree) -> tuple[Array, PyTree]:
        t = jnp.broadcast_to(t, x.shape[:1])
        if context.channels is not None:
            x = jnp.concatenate([x, context.channels], axis=-1)
        if known is not None:
            x = jnp.where(known.mask > 0, known.latents, x)
            t = jnp.where(known.mask[:, :, 0, 0, 0] > 0, 0.0, t[:, None])  # their level 0: no noise
        return model.apply(variables, x, t, c, jnp.ones(c.shape[:2], bool), *rest), memory

    return reverse(network)
