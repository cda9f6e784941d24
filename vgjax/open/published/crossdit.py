"""WanTransformer3DModel of diffusers: which of its fields and tensors are which of CrossDiT's."""

import jax
import jax.numpy as jnp

from vgjax.models.crossdit import CrossDiT
from vgjax.nn import rope
from vgjax.open.tables import Part, Table, expect, heads, linear, merge, mlp, norm
from vgjax.typing import Config, Json


def inputs(model: CrossDiT) -> tuple[jax.ShapeDtypeStruct | None, ...]:
    """Abstract arguments of the smallest call."""
    shapes = [(1, *model.patch, model.channels + model.conditions), (1,), (1, 1, model.text_dim), (1, 1)]
    given = tuple(jax.ShapeDtypeStruct(shape, jnp.bool_ if i == 3 else jnp.float32) for i, shape in enumerate(shapes))
    if not model.image_dim:
        return given
    return (*given, None, None, jax.ShapeDtypeStruct((1, 1, model.image_dim), jnp.float32))


def published(config: Config) -> Json:
    """Our fields, of a config.json of diffusers' WanTransformer3DModel."""
    expect(
        config, qk_norm="rms_norm_across_heads", cross_attn_norm=True, eps=1e-6, freq_dim=256, pos_embed_seq_len=None
    )
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    image_dim = config.get("image_dim") or 0
    expect(config, added_kv_proj_dim=dim if image_dim else None)
    return dict(
        dim=dim,
        heads=config["num_attention_heads"],
        inner=config["ffn_dim"],
        blocks=config["num_layers"],
        channels=config["out_channels"],
        conditions=config["in_channels"] - config["out_channels"],
        text_dim=config["text_dim"],
        image_dim=image_dim,
        patch=tuple(config["patch_size"]),
    )


def weights(model: CrossDiT) -> Table:
    """The tensors of diffusers' WanTransformer3DModel."""
    embed, sizes = "condition_embedder", tuple(zip("pqr", model.patch, strict=True))
    table: Table = {
        "patch_embedding.weight": Part("patches/kernel", "(p q r c) d -> d c p q r", sizes=sizes),
        "patch_embedding.bias": Part("patches/bias"),
        "scale_shift_table": Part("biases/table", "s d -> 1 s d"),
    }
    table |= linear("proj_out", "velocity") | linear(f"{embed}.time_proj", "modulation")
    for name, ours in (("time_embedder", "time/mlp"), ("text_embedder", "text")):
        table |= mlp(f"{embed}.{name}.linear_1", f"{embed}.{name}.linear_2", ours)
    if model.image_dim:
        image = f"{embed}.image_embedder"
        table |= norm(f"{image}.norm1", "image/norm") | norm(f"{image}.norm2", "image/norm_out")
        table |= mlp(f"{image}.ff.net.0.proj", f"{image}.ff.net.2", "image/mlp")
    return table | _of_block(model) if model.blocks else table


def _of_block(model: CrossDiT) -> Table:
    theirs, ours, cross = "blocks.{}", "blocks/block", "blocks/block/cross"
    table: Table = {f"{theirs}.scale_shift_table": Part(f"{ours}/biases/table", "s d -> 1 s d")}
    table |= norm(f"{theirs}.norm2", f"{cross}/norm")
    table |= mlp(f"{theirs}.ffn.net.0.proj", f"{theirs}.ffn.net.2", f"{ours}/mlp")
    table |= merge(f"{theirs}.attn1.to_out.0", f"{ours}/merge") | merge(f"{theirs}.attn2.to_out.0", f"{cross}/merge")
    turned = ("k", rope.interleaved)
    kinds = [
        ("attn1", f"{ours}/qkv", ("to_q", "to_k", "to_v"), turned),
        ("attn2", f"{cross}/q", ("to_q",), None),
        ("attn2", f"{cross}/text_kv", ("to_k", "to_v"), None),
    ]
    norms = [
        ("attn1.norm_q", f"{ours}/norm_q", turned),
        ("attn1.norm_k", f"{ours}/norm_k", turned),
        ("attn2.norm_q", f"{cross}/norm_q", None),
        ("attn2.norm_k", f"{cross}/text_norm", None),
    ]
    if model.image_dim:
        kinds.append(("attn2", f"{cross}/image_kv", ("add_k_proj", "add_v_proj"), None))
        norms.append(("attn2.norm_added_k", f"{cross}/image_norm", None))
    for attention, leaf, names, order in kinds:
        for at, name in enumerate(names):
            table |= heads(f"{theirs}.{attention}.{name}", leaf, at, order=None if name == "to_v" else order)
    for name, leaf, order in norms:
        table[f"{theirs}.{name}.weight"] = Part(f"{leaf}/scale", "h k -> (h k)", order=order)
    return table
