"""T5EncoderModel and UMT5EncoderModel of transformers: which of their fields and tensors are which of T5Encoder's."""

import jax
import jax.numpy as jnp

from vgjax.models.t5 import BUCKETS, REACH, T5Encoder
from vgjax.open.tables import Part, Table, expect, heads, linear, merge, norm
from vgjax.typing import Config, Json

# What a file may hold beyond the tensors of the encoder.
IGNORED: tuple[str, ...] = (
    "encoder.embed_tokens.",  # the same numbers as shared.weight, which is read where both are there
    "decoder.",  # of whole T5s
    "lm_head.",
)
PREFIXES = ("shared.", "encoder.embed_tokens.")  # of the embedding: tied, so that files may hold either alone


def inputs(model: T5Encoder) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Abstract arguments of the smallest call."""
    return jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1, 1), jnp.bool_)


def published(config: Config) -> Json:
    """Our fields, of a config.json of transformers' T5EncoderModel or UMT5EncoderModel."""
    expect(config, feed_forward_proj="gated-gelu", layer_norm_epsilon=1e-6)
    expect(config, relative_attention_num_buckets=BUCKETS, relative_attention_max_distance=REACH)
    return dict(
        vocab=config["vocab_size"],
        dim=config["d_model"],
        heads=config["num_heads"],
        inner=config["d_ff"],
        blocks=config["num_layers"],
        head_dim=config["d_kv"],
        shared_bias=config.get("model_type") != "umt5",
    )


def weights(model: T5Encoder, prefix: str = PREFIXES[0]) -> Table:
    """The tensors of transformers' T5EncoderModel, or of UMT5EncoderModel where every block has its bias.

    prefix: of the embedding's name.
    """
    theirs, ours = "encoder.block.{}.layer", "blocks/block"
    table: Table = {f"{prefix}weight": Part("embedding")} | norm("encoder.final_layer_norm", "norm", bias=False)
    first, owner = ("0", "bias") if model.shared_bias else ("{}", f"{ours}/bias")
    of_bias = f"encoder.block.{first}.layer.0.SelfAttention.relative_attention_bias.weight"
    table[of_bias] = Part(f"{owner}/table")
    table |= norm(f"{theirs}.0.layer_norm", f"{ours}/norm", bias=False)
    table |= norm(f"{theirs}.1.layer_norm", f"{ours}/norm_mlp", bias=False)
    for at, name in enumerate("qkv"):
        table |= heads(f"{theirs}.0.SelfAttention.{name}", f"{ours}/qkv", at, bias=False)
    table |= merge(f"{theirs}.0.SelfAttention.o", f"{ours}/merge", bias=False)
    for name, leaf in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down")):
        table |= linear(f"{theirs}.1.DenseReluDense.{name}", f"{ours}/mlp/{leaf}", bias=False)
    return table
