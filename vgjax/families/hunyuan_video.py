"""HunyuanVideo (2412.03603): LLaVA's Llama reads the prompt in a template, CLIP-L pools it, guidance is embedded."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vgjax.distributed import fetch
from vgjax.errors import UserError
from vgjax.families.stage import Settings, Stage
from vgjax.families.store import Store
from vgjax.flow import schedule
from vgjax.flow.path import reverse
from vgjax.flow.steppers import Velocity
from vgjax.models.hunyuan_vae import decode_clips
from vgjax.typing import Array, Float, Params, PyTree

# The words that the model was trained with; the first CROP tokens, up to the prompt, are not shown to it.
TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)
CROP = 95
LENGTH, POOLED_LENGTH = 256, 77  # tokens that Llama keeps of a prompt, and CLIP
SKIPPED = 2  # blocks of Llama behind the state that is taken


def settings(store: Store, **given: Any) -> Settings:
    """Those of the paper and of the published pipeline; guidance 6 is told to the model, not computed."""
    return dataclasses.replace(Settings(50, (1.0,), 6.0, 129, (720, 1280), 24.0), **given)


def embed(store: Store, prompts: Sequence[str], use: Settings, negative: str | None) -> tuple[PyTree, PyTree]:
    """`(c, mask, vec)` of the prompts, and of the negative prompt for each, or None where no guidance is computed."""
    unique = list(dict.fromkeys([*prompts, negative or ""]))
    all_of = *states(store, unique), pooled(store, unique)

    def of(texts: Sequence[str]) -> PyTree:
        return tuple(a[np.array([unique.index(text) for text in texts])] for a in all_of)

    return of(prompts), of([negative or ""] * len(prompts)) if use.cfg[0] != 1.0 else None


def states(store: Store, texts: Sequence[str]) -> tuple[Float[np.ndarray, "b m d"], np.ndarray]:
    """Llama's hidden states of the prompts in their template, and which of them are real."""
    ids, mask = store.tokens("tokenizer", [TEMPLATE.format(text) for text in texts], CROP + LENGTH)
    blocks = store.published("text_encoder")["num_hidden_layers"] - SKIPPED
    with store.here(), store.model("text_encoder", blocks=blocks, norm=False) as (model, params, _):
        c = fetch(jax.jit(model.apply)({"params": params}, ids, mask))
    return c[:, CROP:].astype(np.float32), mask[:, CROP:]


def pooled(store: Store, texts: Sequence[str]) -> Float[np.ndarray, "b d"]:
    """CLIP's pooled vector of the prompts. It attends to all positions, padding too, as published."""
    ids, mask = store.tokens("tokenizer_2", texts, POOLED_LENGTH)
    with store.here(), store.model("text_encoder_2") as (model, params, _):
        _, vec = jax.jit(model.apply)({"params": params}, ids, np.ones_like(mask))
        return fetch(vec).astype(np.float32)


def stages(store: Store, use: Settings) -> list[Stage]:
    """One model for all times."""
    config = store.scheduler | ({"shift": use.shift} if use.shift else {})
    times = schedule.euler(config, use.steps, whole=True)
    return [Stage("transformer", tuple(times.tolist()), use.cfg[0])]


def condition(store: Store, image: np.ndarray | None, frames: int, size: tuple[int, int]) -> PyTree:
    """Nothing: a text-to-video model."""
    if image is not None:
        raise UserError(f"{store.folder} makes videos of text alone: leave --image out")
    return ()


def velocity(model: Any, params: Params, texts: PyTree, guidance: float, given: PyTree) -> Velocity:
    """The velocity of the prompts."""
    c, mask, vec = texts

    def network(x: Float[Array, "b t h w z"], t: Float[Array, "..."]) -> Float[Array, "b t h w z"]:
        t = jnp.broadcast_to(t, x.shape[:1])
        told = (jnp.full(t.shape, guidance, jnp.float32),) if model.guidance else ()
        return model.apply({"params": params}, x, t, c, mask, vec, *told)

    return reverse(network)


decode = decode_clips


def finished(x: Float[Array, "b t h w z"], given: PyTree) -> Float[Array, "b t h w z"]:
    """The latents as they are."""
    return x
