"""HunyuanVideo (2412.03603): LLaVA's Llama reads the prompt in a template, CLIP-L pools it, guidance is embedded."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from vgjax.errors import UserError
from vgjax.flow import schedule
from vgjax.flow.path import reverse
from vgjax.flow.sampling import Settings
from vgjax.flow.steppers import Velocity
from vgjax.open.stage import Stage
from vgjax.open.store import Store
from vgjax.open.texts import Encoder, Frozen
from vgjax.typing import Array, Context, Float, Module, PyTree

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
NEGATIVE = ""
SKIPPED = 2  # blocks of Llama behind the state that is taken


def settings(store: Store, **given: Any) -> Settings:
    """Those of the paper and of the published pipeline; guidance 6 is told to the model, not computed."""
    if "guidance" in given and not store.published("transformer")["guidance_embeds"]:
        raise UserError(f"--guidance has no effect: {store.folder} is not guidance-distilled; give --cfg instead")
    video = dict(frames=129, size=(720, 1280), fps=24.0)
    base = Settings(steps=50, cfg=1.0, guidance=6.0, stepper=schedule.stepper(store.scheduler), batch=1, **video)
    return dataclasses.replace(base, **given)


def conditioner(store: Store) -> Frozen:
    """Llama's states of the prompts in their template, those of the template cut off; CLIP's pooled vectors, which
    attend to padding too, as published."""
    llama = Encoder("text_encoder", LENGTH, template=TEMPLATE, crop=CROP, skipped=SKIPPED)
    clip = Encoder("text_encoder_2", POOLED_LENGTH, gives="pooled", padded=True)
    return Frozen({"text": (store, llama), "pooled": (store, clip)})


def stages(store: Store, use: Settings) -> list[Stage]:
    """One model for all times."""
    return [Stage("transformer", schedule.published(store.scheduler, use.steps, use.shift, whole=True), use.cfg[0])]


def condition(store: Store, image: np.ndarray | None, frames: int, size: tuple[int, int]) -> Context:
    """Nothing: a text-to-video model."""
    if image is not None:
        raise UserError(f"{store.folder} makes videos of text alone: leave --image out")
    return Context({})


def velocity(model: Module, variables: PyTree, context: Context) -> Velocity:
    """The velocity of a Context."""
    text, told = context.text["text"], [context.scalars["guidance"]] if model.guidance else []

    def network(x: Float[Array, "b t h w z"], t: Float[Array, "..."], memory: PyTree) -> tuple[Array, PyTree]:
        t = jnp.broadcast_to(t, x.shape[:1])
        return model.apply(variables, x, t, *text, context.vec, *told), memory

    return reverse(network)
