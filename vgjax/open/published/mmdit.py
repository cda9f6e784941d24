"""HunyuanVideoTransformer3DModel of diffusers: which of its fields and tensors are which of MMDiT's."""

import jax
import jax.numpy as jnp
import numpy as np

from vgjax.models.mmdit import MMDiT
from vgjax.nn import rope
from vgjax.open.tables import Joined, Part, Table, expect, heads, linear, merge, mlp, norm
from vgjax.typing import Config, Json


def inputs(model: MMDiT) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Abstract arguments of the smallest call."""
    shapes = [(1, *model.patch, model.channels), (1,), (1, 1, model.text_dim), (1, 1), (1, model.pooled_dim)]
    shapes += [(1,)] if model.guidance else []
    return tuple(jax.ShapeDtypeStruct(shape, jnp.bool_ if i == 3 else jnp.float32) for i, shape in enumerate(shapes))


def published(config: Config) -> Json:
    """Our fields, of a config.json of diffusers' HunyuanVideoTransformer3DModel."""
    expect(config, qk_norm="rms_norm", image_condition_type=None, out_channels=config["in_channels"])
    return dict(
        dim=config["num_attention_heads"] * config["attention_head_dim"],
        heads=config["num_attention_heads"],
        double_blocks=config["num_layers"],
        single_blocks=config["num_single_layers"],
        refiner_blocks=config["num_refiner_layers"],
        mlp_ratio=config["mlp_ratio"],
        channels=config["in_channels"],
        text_dim=config["text_embed_dim"],
        pooled_dim=config["pooled_projection_dim"],
        patch=(config["patch_size_t"], config["patch_size"], config["patch_size"]),
        rope_dims=tuple(config["rope_axes_dim"]),
        theta=config["rope_theta"],
        guidance=config["guidance_embeds"],
    )


def weights(model: MMDiT) -> Table:
    """The tensors of diffusers' HunyuanVideoTransformer3DModel."""
    table = {
        "x_embedder.proj.weight": _patches(model, "patches/kernel", "(p q r c) d -> d c p q r"),
        "x_embedder.proj.bias": Part("patches/bias"),
        "proj_out.weight": _patches(model, "velocity/kernel", "d (p q r c) -> (c p q r) d"),
        "proj_out.bias": _patches(model, "velocity/bias", "(p q r c) -> (c p q r)"),
    }
    swapped: Json = dict(order=("s", lambda n: np.arange(n)[::-1]), sizes=(("s", 2),))  # theirs: scale, then shift
    table["norm_out.linear.weight"] = Part("modulation/linear/kernel", "d (s e) -> (s e) d", **swapped)
    table["norm_out.linear.bias"] = Part("modulation/linear/bias", "(s e) -> (s e)", **swapped)
    table |= _of_embed("time_text_embed.timestep_embedder", "time/mlp")
    table |= _of_embed("time_text_embed.text_embedder", "pooled")
    if model.guidance:
        table |= _of_embed("time_text_embed.guidance_embedder", "guidance/mlp")
    table |= linear("context_embedder.proj_in", "refiner/tokens")
    if model.refiner_blocks:
        table |= _of_embed("context_embedder.time_text_embed.timestep_embedder", "refiner/time/mlp")
        table |= _of_embed("context_embedder.time_text_embed.text_embedder", "refiner/pooled")
        table |= _of_refiner("context_embedder.token_refiner.refiner_blocks.{}", "refiner/blocks/block")
    if model.double_blocks:
        table |= _of_double("transformer_blocks.{}", "double/block")
    if model.single_blocks:
        table |= _of_single("single_transformer_blocks.{}", "single/block")
    return table


def _patches(model: MMDiT, leaf: str, dims: str) -> Part:
    return Part(leaf, dims, sizes=tuple(zip("pqr", model.patch, strict=True)))


def _of_embed(theirs: str, ours: str) -> Table:
    return mlp(f"{theirs}.linear_1", f"{theirs}.linear_2", ours)


def _of_qkv(theirs: str, ours: str, names: tuple[str, str, str], norms: tuple[str, str] | None, turned: bool) -> Table:
    table: Table = {}
    for at, name in enumerate(names):
        order = ("k", rope.interleaved) if turned and at < 2 else None
        table |= heads(f"{theirs}.{name}", ours, at, order=order)
    for name, own in zip(norms or (), ("norm_q", "norm_k"), strict=False):
        table[f"{theirs}.{name}.weight"] = Part(f"{ours}/{own}/scale", "k -> k", order=("k", rope.interleaved))
    return table


def _of_double(theirs: str, ours: str) -> Table:
    own, added = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
    table = linear(f"{theirs}.norm1.linear", f"{ours}/video/modulation/linear")
    table |= linear(f"{theirs}.norm1_context.linear", f"{ours}/text/modulation/linear")
    table |= _of_qkv(f"{theirs}.attn", f"{ours}/video/qkv", own, ("norm_q", "norm_k"), turned=True)
    table |= _of_qkv(f"{theirs}.attn", f"{ours}/text/qkv", added, ("norm_added_q", "norm_added_k"), turned=True)
    table |= merge(f"{theirs}.attn.to_out.0", f"{ours}/video/merge")
    table |= merge(f"{theirs}.attn.to_add_out", f"{ours}/text/merge")
    for name, stream in (("ff", "video"), ("ff_context", "text")):
        table |= mlp(f"{theirs}.{name}.net.0.proj", f"{theirs}.{name}.net.2", f"{ours}/{stream}/mlp")
    return table


def _of_single(theirs: str, ours: str) -> Table:
    out = Part(f"{ours}/merge/kernel", "h k d -> d (h k)"), Part(f"{ours}/mlp/down/kernel", "i d -> d i")
    table = linear(f"{theirs}.norm.linear", f"{ours}/modulation/linear") | linear(
        f"{theirs}.proj_mlp", f"{ours}/mlp/up"
    )
    table |= _of_qkv(f"{theirs}.attn", f"{ours}/qkv", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), turned=True)
    return table | {
        f"{theirs}.proj_out.weight": Joined(out, 1),
        f"{theirs}.proj_out.bias": Part(f"{ours}/mlp/down/bias"),
    }


def _of_refiner(theirs: str, ours: str) -> Table:
    table = norm(f"{theirs}.norm1", f"{ours}/norm") | norm(f"{theirs}.norm2", f"{ours}/norm_mlp")
    table |= linear(f"{theirs}.norm_out.linear", f"{ours}/modulation/linear")
    table |= _of_qkv(f"{theirs}.attn", f"{ours}/qkv", ("to_q", "to_k", "to_v"), None, turned=False)
    table |= merge(f"{theirs}.attn.to_out.0", f"{ours}/merge")
    return table | mlp(f"{theirs}.ff.net.0.proj", f"{theirs}.ff.net.2", f"{ours}/mlp")
