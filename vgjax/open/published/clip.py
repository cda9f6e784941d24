"""CLIPTextModel and CLIPVisionModel of transformers: which of their fields and tensors are which of ours."""

import jax
import jax.numpy as jnp

from vgjax.errors import UserError
from vgjax.models.clip import ACTS, EPS, CLIPText, CLIPVision
from vgjax.open.tables import Part, Table, expect, heads, linear, merge, mlp, norm
from vgjax.typing import Config, Json

PREFIXES = (None, "")  # of the names in files: as published, and as transformers 5 writes them
# What a file may hold beyond the tensors of an encoder.
IGNORED: tuple[str, ...] = (
    "text_model.embeddings.position_ids",  # 0, 1, 2, ...: a buffer that older files keep
    "vision_model.embeddings.position_ids",
    "embeddings.position_ids",
)


def inputs(model: CLIPText | CLIPVision) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Abstract arguments of the smallest call."""
    if isinstance(model, CLIPVision):
        return (jax.ShapeDtypeStruct((1, model.patch, model.patch, 3), jnp.float32),)
    return jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1, 1), jnp.bool_)


def published(config: Config) -> Json:
    """Our fields, of a config.json of transformers' CLIPTextModel or CLIPVisionModel."""
    expect(config, layer_norm_eps=EPS)
    if config.get("hidden_act") not in ACTS:
        raise UserError(f"CLIP: hidden_act={config.get('hidden_act')!r} is not supported, only {', '.join(ACTS)}")
    fields = dict(
        dim=config["hidden_size"],
        heads=config["num_attention_heads"],
        inner=config["intermediate_size"],
        blocks=config["num_hidden_layers"],
        act=config["hidden_act"],
    )
    if "patch_size" in config:
        return fields | dict(patch=config["patch_size"], image=config["image_size"])
    eos = config.get("eos_token_id", 2)  # 2 stands in older files, where the highest id is meant
    own = dict(vocab=config["vocab_size"], positions=config["max_position_embeddings"], eos=None if eos == 2 else eos)
    return fields | own


def weights(model: CLIPText | CLIPVision, prefix: str | None = None) -> Table:
    """The tensors of transformers' CLIPTextModel (with projection: CLIPTextModelWithProjection) or CLIPVisionModel.

    prefix: of their names; None: "text_model." or "vision_model.", as published. What transformers 5 itself writes of
    a model without projection has none.
    """
    is_text = isinstance(model, CLIPText)
    root = ("text_model." if is_text else "vision_model.") if prefix is None else prefix
    table: Table = {f"{root}embeddings.position_embedding.weight": Part("places")}
    if is_text:
        table[f"{root}embeddings.token_embedding.weight"] = Part("tokens")
        table |= norm(f"{root}final_layer_norm", "norm")
        if model.projection is not None:
            table |= linear("text_projection", "projection", bias=False)
    else:
        sides = tuple((side, model.patch) for side in "pq")
        table[f"{root}embeddings.class_embedding"] = Part("class")
        table[f"{root}embeddings.patch_embedding.weight"] = Part("patches/kernel", "(p q c) d -> d c p q", sizes=sides)
        table |= norm(f"{root}pre_layrnorm", "norm")
        if model.norm:
            table |= norm(f"{root}post_layernorm", "norm_out")
    return table | _of_block(f"{root}encoder.layers.{{}}", "blocks/block") if model.blocks else table


def _of_block(theirs: str, ours: str) -> Table:
    table = norm(f"{theirs}.layer_norm1", f"{ours}/norm") | norm(f"{theirs}.layer_norm2", f"{ours}/norm_mlp")
    for at, name in enumerate("qkv"):
        table |= heads(f"{theirs}.self_attn.{name}_proj", f"{ours}/qkv", at)
    table |= merge(f"{theirs}.self_attn.out_proj", f"{ours}/merge")
    return table | mlp(f"{theirs}.mlp.fc1", f"{theirs}.mlp.fc2", f"{ours}/mlp")
