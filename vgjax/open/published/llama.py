"""LlamaModel and LlamaForCausalLM of transformers: which of their fields and tensors are which of Llama's."""

import jax
import jax.numpy as jnp

from vgjax.models.llama import Llama
from vgjax.open.tables import Part, Table, expect, heads, linear, merge, norm
from vgjax.typing import Config, Json

PREFIXES = ("", "model.")  # of the names in files of LlamaModel, and of LlamaForCausalLM
IGNORED = ("lm_head.",)  # scores of the next token: nothing is generated


def inputs(model: Llama) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Abstract arguments of the smallest call."""
    return jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1, 1), jnp.bool_)


def published(config: Config) -> Json:
    """Our fields, of a config.json of transformers' LlamaModel."""
    expect(config, hidden_act="silu", attention_bias=False, mlp_bias=False)
    rope_of = config.get("rope_parameters") or config.get("rope_scaling") or {}
    expect(rope_of, rope_type="default", type="default")
    return dict(
        vocab=config["vocab_size"],
        dim=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        inner=config["intermediate_size"],
        blocks=config["num_hidden_layers"],
        theta=config.get("rope_theta") or rope_of.get("rope_theta", 1e4),
        eps=config["rms_norm_eps"],
    )


def weights(model: Llama, prefix: str = "") -> Table:
    """The tensors of transformers' LlamaModel; `prefix` is "model." in the files of LlamaForCausalLM."""
    theirs, ours = f"{prefix}layers.{{}}", "blocks/block"
    table: Table = {f"{prefix}embed_tokens.weight": Part("embedding")}
    if model.norm:
        table |= norm(f"{prefix}norm", "norm", bias=False)
    if not model.blocks:
        return table
    table |= norm(f"{theirs}.input_layernorm", f"{ours}/norm", bias=False)
    table |= norm(f"{theirs}.post_attention_layernorm", f"{ours}/norm_mlp", bias=False)
    for name, leaf, at in (("q", "q", 0), ("k", "kv", 0), ("v", "kv", 1)):
        table |= heads(f"{theirs}.self_attn.{name}_proj", f"{ours}/{leaf}", at, bias=False)
    table |= merge(f"{theirs}.self_attn.o_proj", f"{ours}/merge", bias=False)
    for name in ("gate", "up", "down"):
        table |= linear(f"{theirs}.mlp.{name}_proj", f"{ours}/mlp/{name}", bias=False)
    return table
