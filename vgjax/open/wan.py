"""Wan 2.1 and 2.2 (2503.20314): umT5 reads the prompt, guidance is computed, two experts share the times in 2.2.

An image as first frame: in the channels behind the latents, with a mask, and for 2.1 in its CLIP's tokens; or, where
times are per frame (2.2's 5B), as the first latent frame itself, at the time of clean data.
"""

import dataclasses
import html
import re
from collections.abc import Sequence
from typing import Any

import ftfy
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
from vgjax.nn.codec import decode_stream, encode_stream, stats_of, to_unit
from vgjax.objectives.vae import from_uint8
from vgjax.open import folders
from vgjax.open.stage import Stage
from vgjax.open.store import Store
from vgjax.open.texts import Texts, apply
from vgjax.parallel.distributed import fetch
from vgjax.typing import Array, Float, Params, PyTree, UInt8

LENGTH = 512  # tokens of a prompt
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


def texts(store: Store, prompts: Sequence[str]) -> Texts:
    """umT5's states of the prompts."""
    ids, mask = store.tokens("tokenizer", prompts, LENGTH)
    with store.here(), store.model("text_encoder") as (model, params, _):
        return apply(model, params, ids, mask), mask, None


def clean(text: str) -> str:
    """A prompt as the models were trained to see it: broken Unicode mended, HTML undone, white space single."""
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


def condition(store: Store, image: np.ndarray | None, frames: int, size: tuple[int, int]) -> PyTree:
    """What of an image the model is given: `{"behind"}` channels, `{"tokens"}`, or the `{"first"}` latent frame."""
    takes = "ImageToVideo" in store.index["_class_name"]
    if takes != (image is not None):
        raise UserError(
            f"{store.folder} {'starts from an image: give --image' if takes else 'takes no image: leave --image out'}"
        )
    if image is None:
        return {}
    resized = Image.fromarray(image).resize(size[::-1], Image.Resampling.LANCZOS)
    pixels = from_uint8(jnp.asarray(resized)[None, None])
    each = store.index.get("expand_timesteps")
    video = np.asarray(pixels) if each else np.pad(pixels, ((0, 0), (0, frames - 1), *((0, 0),) * 3))
    with store.here(), store.model("vae") as (vae, params, meta):
        mean, _ = encode(vae, params, store.put(video))
        mean, behind = fetch(mean), vae.time_factor
    z = np.asarray(to_unit(jnp.asarray(mean), stats_of(meta["stats"])))
    if each:
        return {"first": z}
    shown = (np.arange(z.shape[1]) == 0).astype(np.float32)
    mask = repeat(shown, "t -> 1 t h w r", h=z.shape[2], w=z.shape[3], r=behind)
    given = {"behind": np.concatenate([mask, z], axis=-1)}
    if store.has("image_encoder"):
        blocks = store.published("image_encoder")["num_hidden_layers"] - 1
        with store.here(), store.model("image_encoder", blocks=blocks, norm=False) as (model, params, _):
            tokens_of = jax.jit(model.apply)({"params": params}, store.put(seen(store, image)))
            given["tokens"] = fetch(tokens_of).astype(np.float32)
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


def velocity(model: Any, variables: PyTree, texts: PyTree, guidance: float | int, given: PyTree) -> Velocity:
    """The velocity of the prompts, with what is given of an image. The zeros behind a text are attended to."""
    c, *_ = texts

    def network(x: Float[Array, "b t h w z"], t: Float[Array, "..."], memory: PyTree) -> tuple[Array, PyTree]:
        t = jnp.broadcast_to(t, x.shape[:1])
        rest = ()
        if "behind" in given:
            x = jnp.concatenate(
                [x, jnp.broadcast_to(given["behind"], (*x.shape[:-1], given["behind"].shape[-1]))], axis=-1
            )
        if "tokens" in given:
            rest = (
                None,
                None,
                jnp.broadcast_to(given["tokens"], (len(x), *given["tokens"].shape[1:])),
            )
        if "first" in given:
            x = finished(x, given)
            clean = jnp.arange(x.shape[1]) == 0  # their level 0: no noise
            t = jnp.where(clean, 0.0, t[:, None])
        return model.apply(variables, x, t, c, jnp.ones(c.shape[:2], bool), *rest), memory

    return reverse(network)


def encode(
    vae: Any, params: Params, video: Float[Array, "b t h w 3"]
) -> tuple[Float[Array, "b s i j z"], Float[Array, "b s i j z"]]:
    """Mean and log-variance of the latents, a latent frame at a time."""
    return encode_stream(vae, params, video, vae.time_factor)


def decode(vae: Any, params: Params, z: Float[Array, "b s i j z"]) -> Float[Array, "b t h w c"]:
    """Video of the latents, one latent frame at a time, so that memory does not grow with its length."""
    return decode_stream(vae, params, z, 1)


def finished(x: Float[Array, "b t h w z"], given: PyTree) -> Float[Array, "b t h w z"]:
    """The latents, the given first frame in its place."""
    if "first" not in given:
        return x
    return jnp.concatenate([jnp.broadcast_to(given["first"], (len(x), *given["first"].shape[1:])), x[:, 1:]], axis=1)
