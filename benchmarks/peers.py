"""How fast are our models beside torch's (diffusers), with the same weights, on the same machine, in the same run?

    python benchmarks/peers.py [--rounds 7] [--only wan-decode ...]

Transformers and VAEs of HunyuanVideo and Wan with published heads, patches and groups, narrower and shallower: forward;
forward and backward (gradients of all parameters of the output's mean square); encode; decode. Both warm up once, then
take turns; the ratio is that of the medians, ours over theirs. On a CPU in fp32, torch as it is; on a GPU in bf16,
torch compiled. What both say must agree within `BOUND`: the largest error, of the standard deviation; of gradients the
norm of all errors, of that of all gradients. Writes benchmarks/results/peers_<chip>.json, unless --only is given.
"""

import argparse
import functools
import gc
import os
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from einops import rearrange
from flax import linen as nn
from record import write

from vgjax.open import tables
from vgjax.open.published import crossdit, hunyuan_vae, mmdit, wan_vae
from vgjax.parallel.sharding import platform, unboxed

BOUND = {"float32": 1e-4, "bfloat16": 0.3}
GRID, TEXT = (5, 36, 40), 128  # latents, of 1800 tokens, and text tokens that the transformers are given
VIDEO = (9, 96, 96)  # frames, height and width for the VAEs
WIDTH = dict(num_attention_heads=6, attention_head_dim=128)
# Of each family our module and class, theirs, and what its config says other than by default.
TRANSFORMERS: dict[str, tuple] = {
    "hunyuan": (mmdit, mmdit.MMDiT, diffusers.HunyuanVideoTransformer3DModel, dict(num_layers=2, num_single_layers=4)),
    "wan": (crossdit, crossdit.CrossDiT, diffusers.WanTransformer3DModel, dict(num_layers=4, ffn_dim=4480)),
}
LEVELS = dict(block_out_channels=(64, 128, 256, 256))
VAES: dict[str, tuple] = {
    "hunyuan": (hunyuan_vae, hunyuan_vae.HunyuanVAE, diffusers.AutoencoderKLHunyuanVideo, LEVELS),
    "wan": (wan_vae, wan_vae.WanVAE, diffusers.AutoencoderKLWan, dict(base_dim=64)),
}


class Pair(NamedTuple):
    """One call of ours and the same of theirs, each until it is done, and the error of one's result by the other's."""

    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    error: Callable[[Any, Any], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="NAME", help=", ".join(ROWS))
    args = parser.parse_args()
    share()
    rows = [measure(name, args.rounds) for name in args.only or ROWS]
    if not args.only:
        record("peers", rows)


def share() -> None:
    """The machine is for both."""
    diffusers.utils.logging.set_verbosity_error()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    torch.set_num_threads(len(os.sched_getaffinity(0)))


def record(name: str, rows: list[dict]) -> None:
    chip = "cpu" if platform() == "cpu" else jax.devices()[0].device_kind.lower().replace(" ", "_")
    write(f"{name}_{chip}", {"torch": torch.__version__, "diffusers": diffusers.__version__, "rows": rows})


def measure(name: str, rounds: int) -> dict:
    pair = ROWS[name]()
    error = agreed(name, pair)
    ours, theirs = medians(pair, rounds)
    row = {"name": name, "ours_ms": round(1e3 * ours), "theirs_ms": round(1e3 * theirs)}
    row |= {"ratio": round(ours / theirs, 2), "error": error}
    print(row, file=sys.stderr, flush=True)
    del pair
    jax.clear_caches()
    torch.compiler.reset()
    gc.collect()
    return row


def agreed(name: str, pair: Pair) -> float:
    """The error, to two digits, of results that agree."""
    error = pair.error(pair.ours(), pair.theirs())
    assert error <= BOUND[jnp.dtype(dtypes()[0]).name], f"{name}: ours and theirs differ by {error:.1e}"
    return float(f"{error:.1e}")


def medians(pair: Pair, rounds: int) -> tuple[float, float]:
    """Seconds of ours and of theirs, which take turns."""
    ours, theirs = np.median([[seconds(pair.ours), seconds(pair.theirs)] for _ in range(rounds)], axis=0)
    return float(ours), float(theirs)


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def transformer(family: str, backward: bool) -> Pair:
    module, model, params, theirs = build(*TRANSFORMERS[family], **WIDTH)
    given, passed = inputs(model, GRID, TEXT)
    if platform() != "cpu":
        theirs.compile()
    run = functools.partial(theirs, **passed, return_dict=False)
    if not backward:
        ours = jax.jit(lambda p, *given: model.apply({"params": p}, *given))
        return Pair(done(ours, params, *given), finished(lambda: run()[0]), distance)

    def gradients() -> dict[str, torch.Tensor]:
        theirs.zero_grad(set_to_none=True)
        run()[0].float().square().mean().backward()
        return {name: parameter.grad for name, parameter in theirs.named_parameters()}

    ours = jax.jit(jax.grad(lambda p, *given: jnp.mean(jnp.square(model.apply({"params": p}, *given)))))
    apart = functools.partial(gradients_apart, module.weights(model))
    return Pair(done(ours, params, *given), finished(gradients, grad=True), apart)


def inputs(model: nn.Module, grid: tuple[int, int, int], text: int) -> tuple[list[jax.Array], dict[str, torch.Tensor]]:
    """The arguments of ours and of theirs, on latents of this grid and so many tokens of text, none of them padding."""
    random = np.random.default_rng(0)
    x = random.standard_normal((1, *grid, model.channels), np.float32)
    t, c = np.full(1, 0.5, np.float32), random.standard_normal((1, text, model.text_dim), np.float32)
    given = [x, t, c, np.ones((1, text), bool)]
    passed = dict(hidden_states=x, timestep=1e3 * t, encoder_hidden_states=c)
    if isinstance(model, mmdit.MMDiT):
        vec = random.standard_normal((1, model.pooled_dim), np.float32)
        # At the published 6000 radians an ulp of a frequency is seen, and torch's differ from chip to chip.
        given += [vec, np.ones(1, np.float32)]
        passed |= dict(encoder_attention_mask=given[3], pooled_projections=vec, guidance=np.full(1, 1e3, np.float32))
    passed = {name: to_torch(a, name not in ("timestep", "guidance")) for name, a in passed.items()}
    return jax.device_put(given), passed


def vae(family: str, way: str) -> Pair:
    _, model, params, theirs = build(*VAES[family])
    shape = (*VIDEO, 3) if way == "encode" else model.latent_shape(*VIDEO)
    x = np.random.default_rng(0).uniform(-1, 1, (1, *shape)).astype(np.float32)
    call, seen = getattr(theirs, way), to_torch(x)
    call = call if platform() == "cpu" else torch.compile(call)

    def run() -> torch.Tensor:
        out = call(seen, return_dict=False)[0]
        return out.mean if way == "encode" else out

    def own(params: Any, x: jax.Array) -> jax.Array:
        out = model.apply({"params": params}, x, method=way)
        return out[0] if way == "encode" else out

    return Pair(done(jax.jit(own), params, jnp.asarray(x)), finished(run), distance)


def dtypes() -> tuple[Any, torch.dtype]:
    """What ours and theirs compute in, and keep their parameters in."""
    return (jnp.float32, torch.float32) if platform() == "cpu" else (jnp.bfloat16, torch.bfloat16)


def build(
    module: ModuleType, kind: Any, reference: Any, config: dict, **more: int
) -> tuple[ModuleType, nn.Module, Any, torch.nn.Module]:
    """Our module, model and parameters, and theirs in eval mode with the same: every one random, none of them zero."""
    torch.manual_seed(0)
    theirs = reference(**config, **more).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
            if name.startswith("decoder.conv_out"):  # theirs clips pixels to [-1, 1], ours does not
                parameter *= 0.1
    model = kind(**module.published(theirs.config), dtype=dtypes()[0])
    zeros = [jnp.zeros(one.shape, one.dtype) for one in module.inputs(model)]
    abstract = jax.eval_shape(lambda: model.init(jax.random.key(0), *zeros)["params"])
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    params = tables.load(module.weights(model), unboxed(abstract), state.__getitem__)
    params = jax.tree.map(lambda leaf: leaf.astype(dtypes()[0]), params)
    return module, model, params, theirs.to(dtype=dtypes()[1], device=where())


def where() -> str:
    return "cpu" if platform() == "cpu" else "cuda"


def to_torch(x: np.ndarray, is_cast: bool = True) -> torch.Tensor:
    """On its device and, if it is to be cast, in its type; videos channels first."""
    x = rearrange(x, "b t h w c -> b c t h w") if x.ndim == 5 else x
    dtype = dtypes()[1] if is_cast and x.dtype == np.float32 else None
    return torch.tensor(x).to(device=where(), dtype=dtype).contiguous()


def done(function: Callable, *args: Any) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(function(*args))


def finished(function: Callable, grad: bool = False) -> Callable[[], Any]:
    def call() -> Any:
        with torch.inference_mode(not grad):
            out = function()
        if platform() != "cpu":
            torch.cuda.synchronize()
        return out

    return call


def distance(ours: jax.Array, theirs: torch.Tensor) -> float:
    """The largest error, of the standard deviation of theirs."""
    expected = rearrange(theirs.float().cpu().numpy(), "b c t h w -> b t h w c")
    return float(np.abs(np.asarray(ours, np.float32) - expected).max() / expected.std())


def gradients_apart(table: tables.Table, ours: Any, theirs: dict[str, torch.Tensor]) -> float:
    """The norm of all errors, of that of all gradients of theirs."""
    expected = {name: grad.float().cpu().numpy() for name, grad in theirs.items()}
    errors = (np.float32(own) - expected[name] for name, own in tables.export(table, ours))
    norms = (np.sqrt(sum(float(np.sum(np.square(a))) for a in of)) for of in (errors, expected.values()))
    return next(norms) / next(norms)


ROWS: dict[str, Callable[[], Pair]] = {}
for _family in TRANSFORMERS:
    for _part, _backward in (("forward", False), ("backward", True)):
        ROWS[f"{_family}-{_part}"] = functools.partial(transformer, _family, _backward)
    for _way in ("encode", "decode"):
        ROWS[f"{_family}-{_way}"] = functools.partial(vae, _family, _way)


if __name__ == "__main__":
    main()
