"""AutoencoderKLHunyuanVideo of diffusers: which of its fields and tensors are which of HunyuanVAE's."""

import itertools

import jax
import jax.numpy as jnp

from vgjax.models.hunyuan_vae import HunyuanVAE, strides
from vgjax.open.tables import Part, Table, expect, norm
from vgjax.typing import Config, Json


def inputs(model: HunyuanVAE) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Abstract arguments of the smallest call."""
    return (jax.ShapeDtypeStruct((1, 1, model.space_factor, model.space_factor, 3), jnp.float32),)


def published(config: Config) -> Json:
    """Our fields, of a config.json of diffusers' AutoencoderKLHunyuanVideo."""
    expect(config, in_channels=3, out_channels=3, act_fn="silu", mid_block_add_attention=True)
    return dict(
        channels=tuple(config["block_out_channels"]),
        blocks=config["layers_per_block"],
        groups=config["norm_num_groups"],
        latent_channels=config["latent_channels"],
        time_factor=config["temporal_compression_ratio"],
        space_factor=config["spatial_compression_ratio"],
    )


def stats(config: Config) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the latents of a published config.json."""
    channels = config["latent_channels"]
    return [0.0] * channels, [1.0 / config["scaling_factor"]] * channels


def weights(model: HunyuanVAE) -> Table:
    """The tensors of diffusers' AutoencoderKLHunyuanVideo."""
    table = _of_conv("quant_conv", "quant") | _of_conv("post_quant_conv", "post_quant")
    table |= _of_pyramid("encoder", "down", model.channels, model.blocks, model)
    return table | _of_pyramid("decoder", "up", model.channels[::-1], model.blocks + 1, model)


def _of_pyramid(side: str, way: str, channels: tuple[int, ...], blocks: int, model: HunyuanVAE) -> Table:
    table = _of_conv(f"{side}.conv_in.conv", f"{side}/conv_in") | _of_conv(f"{side}.conv_out.conv", f"{side}/conv_out")
    table |= norm(f"{side}.conv_norm_out", f"{side}/norm_out")
    table |= _of_attention(f"{side}.mid_block.attentions.0", f"{side}/attention")
    for i in range(2):
        table |= _of_block(f"{side}.mid_block.resnets.{i}", f"{side}/mid_{i}", shortcut=False)
    levels = itertools.pairwise((channels[0], *channels))
    for level, (before, after) in enumerate(levels):
        theirs = f"{side}.{way}_blocks.{level}"
        for i in range(blocks):
            shortcut = i == 0 and before != after
            table |= _of_block(f"{theirs}.resnets.{i}", f"{side}/block_{level}_{i}", shortcut)
        if strides(len(channels), model.time_factor, model.space_factor)[level] != (1, 1):
            table |= _of_conv(f"{theirs}.{way}samplers.0.conv.conv", f"{side}/{way}_{level}")
    return table


def _of_block(theirs: str, ours: str, shortcut: bool) -> Table:
    table: Table = {}
    for i in (1, 2):
        table |= norm(f"{theirs}.norm{i}", f"{ours}/norm_{i}") | _of_conv(f"{theirs}.conv{i}.conv", f"{ours}/conv_{i}")
    return table | (_of_conv(f"{theirs}.conv_shortcut.conv", f"{ours}/shortcut") if shortcut else {})


def _of_conv(theirs: str, ours: str) -> Table:
    return {
        f"{theirs}.weight": Part(f"{ours}/kernel", "r p q i o -> o i r p q"),
        f"{theirs}.bias": Part(f"{ours}/bias"),
    }


def _of_attention(theirs: str, ours: str) -> Table:
    table = norm(f"{theirs}.group_norm", f"{ours}/norm")
    for at, name in enumerate(("to_q", "to_k", "to_v")):
        table[f"{theirs}.{name}.weight"] = Part(f"{ours}/qkv/kernel", "d h k -> (h k) d", at)
        table[f"{theirs}.{name}.bias"] = Part(f"{ours}/qkv/bias", "h k -> (h k)", at)
    table[f"{theirs}.to_out.0.weight"] = Part(f"{ours}/merge/kernel", "h k d -> d (h k)")
    table[f"{theirs}.to_out.0.bias"] = Part(f"{ours}/merge/bias")
    return table
