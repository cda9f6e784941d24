"""AutoencoderKLWan of diffusers: which of its fields and tensors are which of WanVAE's, and its latent statistics."""

import itertools

import jax
import jax.numpy as jnp

from vgjax.models.wan_vae import WanVAE
from vgjax.open.tables import Part, Table, expect
from vgjax.typing import Config, Json


def inputs(model: WanVAE) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Abstract arguments of the smallest call."""
    return (jax.ShapeDtypeStruct((1, 1, model.space_factor, model.space_factor, 3), jnp.float32),)


def published(config: Config) -> Json:
    """Our fields, of a config.json of diffusers' AutoencoderKLWan."""
    patch = config.get("patch_size") or 1
    expect(config, attn_scales=[], in_channels=3 * patch**2, out_channels=3 * patch**2, dropout=0.0)
    return dict(
        width=config["base_dim"],
        decoder_width=config.get("decoder_base_dim"),
        multipliers=tuple(config["dim_mult"]),
        blocks=config["num_res_blocks"],
        time=tuple(2 if halved else 1 for halved in config["temperal_downsample"]),
        latent_channels=config["z_dim"],
        patch=patch,
        shortcuts=config.get("is_residual", False),
    )


def stats(config: Config) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the latents of a published config.json."""
    return list(config["latents_mean"]), list(config["latents_std"])


def weights(model: WanVAE) -> Table:
    """The tensors of diffusers' AutoencoderKLWan."""
    table = _of_conv("quant_conv", "to_latent") | _of_conv("post_quant_conv", "from_latent")
    for half in ("encoder", "decoder"):
        table |= _of_conv(f"{half}.conv_in", f"{half}/conv_in") | _of_conv(f"{half}.conv_out", f"{half}/conv_out")
        table |= _of_norm(f"{half}.norm_out", f"{half}/norm_out") | _of_attention(half)
        for i in range(2):
            table |= _of_block(f"{half}.mid_block.resnets.{i}", f"{half}/block_mid_{i}")
    # Theirs has the pixels of a patch column by column.
    patch: Json = dict(sizes=(("p", model.patch), ("q", model.patch)))
    table["encoder.conv_in.weight"] = Part("encoder/conv_in/kernel", "t h w (c p q) o -> o (c q p) t h w", **patch)
    table["decoder.conv_out.weight"] = Part("decoder/conv_out/kernel", "t h w i (c p q) -> (c q p) i t h w", **patch)
    table["decoder.conv_out.bias"] = Part("decoder/conv_out/bias", "(c p q) -> (c q p)", **patch)
    return table | _of_encoder(model) | _of_decoder(model)


def _of_encoder(model: WanVAE) -> Table:
    table: Table = {}
    channels, _ = model.channels
    flat = itertools.count()  # Wan 2.1 counts blocks and strides through all levels
    for level, (before, features) in enumerate(itertools.pairwise(channels)):
        for i in range(model.blocks):
            own = f"{level}.resnets.{i}" if model.shortcuts else next(flat)
            widens = i == 0 and before != features
            table |= _of_block(f"encoder.down_blocks.{own}", f"encoder/block_{level}_{i}", widens)
        if level < len(model.time):
            own = f"{level}.downsampler" if model.shortcuts else next(flat)
            table |= _of_stride(f"encoder.down_blocks.{own}", f"encoder/down_{level}", model.time[level])
    return table


def _of_decoder(model: WanVAE) -> Table:
    table: Table = {}
    _, channels = model.channels
    before = channels[0]
    for level, features in enumerate(channels):
        for i in range(model.blocks + 1):
            theirs, ours = f"decoder.up_blocks.{level}.resnets.{i}", f"decoder/block_{level}_{i}"
            table |= _of_block(theirs, ours, i == 0 and before != features)
        before = features if model.shortcuts else features // 2
        if level < len(model.time):
            own, time = "upsampler" if model.shortcuts else "upsamplers.0", model.time[::-1][level]
            table |= _of_stride(f"decoder.up_blocks.{level}.{own}", f"decoder/up_{level}", time)
            if time == 2:  # theirs has the two frames of a channel far apart
                temporal, two = f"decoder.up_blocks.{level}.{own}.time_conv", (("s", 2),)
                kernel = Part(f"decoder/up_{level}/temporal/kernel", "t h w i (o s) -> (s o) i t h w", sizes=two)
                bias = Part(f"decoder/up_{level}/temporal/bias", "(o s) -> (s o)", sizes=two)
                table |= {f"{temporal}.weight": kernel, f"{temporal}.bias": bias}
    return table


def _of_conv(theirs: str, ours: str, dims: str = "t h w i o -> o i t h w") -> Table:
    return {f"{theirs}.weight": Part(f"{ours}/kernel", dims), f"{theirs}.bias": Part(f"{ours}/bias")}


def _of_norm(theirs: str, ours: str, dims: str = "c -> c 1 1 1") -> Table:
    return {f"{theirs}.gamma": Part(f"{ours}/scale", dims)}


def _of_block(theirs: str, ours: str, widens: bool = False) -> Table:
    table = _of_conv(f"{theirs}.conv_shortcut", f"{ours}/shortcut") if widens else {}
    for i in (1, 2):
        table |= _of_norm(f"{theirs}.norm{i}", f"{ours}/norm_{i}") | _of_conv(f"{theirs}.conv{i}", f"{ours}/conv_{i}")
    return table


def _of_stride(theirs: str, ours: str, time: int) -> Table:
    table = _of_conv(f"{theirs}.resample.1", f"{ours}/spatial", "t h w i o -> o i (t h) w")
    return table | (_of_conv(f"{theirs}.time_conv", f"{ours}/temporal") if time == 2 else {})


def _of_attention(half: str) -> Table:
    theirs, ours = f"{half}.mid_block.attentions.0", f"{half}/attention"
    return _of_norm(f"{theirs}.norm", f"{ours}/norm", "c -> c 1 1") | {
        f"{theirs}.to_qkv.weight": Part(f"{ours}/qkv/kernel", "s d h k -> (s h k) d 1 1"),
        f"{theirs}.to_qkv.bias": Part(f"{ours}/qkv/bias", "s h k -> (s h k)"),
        f"{theirs}.proj.weight": Part(f"{ours}/merge/kernel", "h k d -> d (h k) 1 1"),
        f"{theirs}.proj.bias": Part(f"{ours}/merge/bias"),
    }
