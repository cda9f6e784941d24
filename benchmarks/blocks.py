"""How fast are blocks of the 13B's shape beside torch's, with the same weights, in the same run, and at what MFU?

    python benchmarks/blocks.py [--double 2 --single 4] [--tokens 8k 32k 720p] [--rounds 5]

HunyuanVideo's transformer with its published width (24 heads of 128; on a CPU 2 of them and few tokens, which says
only that all of this runs), as many blocks as asked: a forward, and a train step (forward, backward, AdamW) in which
both recompute what they do not keep: ours all but attention, torch's whole blocks. In bf16 on a GPU, where torch is
compiled and its attention gets no mask (all text is real), so that it takes flash or cuDNN kernels; fp32 on a CPU. Both
warm up, then take turns; medians. The error of a forward is that of `benchmarks/peers.py`, of a train step that of the
loss after a step. MFU is of model FLOPs (recomputation is none), `full_s` the time of all 20 + 40 published blocks at
the rate of those measured, where they are in proportion. Writes benchmarks/results/blocks_<chip>.json.
"""

import argparse
import functools
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import optax
import torch
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from peers import Pair, agreed, build, distance, done, dtypes, finished, inputs, medians, record, share

from vgjax.models import mmdit
from vgjax.parallel.sharding import platform
from vgjax.planner import flops

TEXT, LR = 256, 1e-4
GRIDS = {"8k": (9, 60, 60), "32k": (33, 62, 64), "720p": (33, 90, 160)}  # latents: 8,100, 32,736 and 118,800 tokens
SMALL = {"8k": (3, 8, 8), "32k": (3, 16, 16), "720p": (5, 16, 16)}
PUBLISHED = (20, 40)


class Unmasked(HunyuanVideoAttnProcessor2_0):
    """Attention of all to all; diffusers passes on what the signature names."""

    def __call__(
        self, attn: Any, hidden_states: Any, encoder_hidden_states: Any, attention_mask: Any, image_rotary_emb: Any
    ) -> Any:
        return super().__call__(attn, hidden_states, encoder_hidden_states, None, image_rotary_emb)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--double", type=int, default=2)
    parser.add_argument("--single", type=int, default=4)
    parser.add_argument("--tokens", nargs="+", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    share()
    small = platform() == "cpu"
    depth = dict(num_layers=args.double, num_single_layers=args.single)
    _, model, params, theirs = build(
        mmdit, mmdit.MMDiT, diffusers.HunyuanVideoTransformer3DModel, depth, num_attention_heads=2 if small else 24,
        attention_head_dim=128,
    )  # fmt: skip
    for block in (*theirs.transformer_blocks, *theirs.single_transformer_blocks):
        block.attn.set_processor(Unmasked())
    if not small:
        theirs.compile()
    rows = []
    for name in args.tokens:
        given, passed = inputs(model, (SMALL if small else GRIDS)[name], TEXT)
        tokens = model.tokens(given[0].shape[1:4]) + TEXT
        needed = flops.count(functools.partial(forward, model), params, *given)
        shared = {"tokens": tokens, "double": args.double, "single": args.single}
        rows.append(shared | forwards(model, params, theirs, given, passed, needed, args.rounds))
        rows.append(shared | steps(model, params, theirs, given, passed, flops.training(needed), args.rounds))
        for row in rows[-2:]:
            if not small and args.double * PUBLISHED[1] == args.single * PUBLISHED[0]:
                row["full_s"] = round(1e-3 * row["ours_ms"] * PUBLISHED[0] / args.double, 3)
            print(row, flush=True)
    record("blocks", rows)


def forward(model: mmdit.MMDiT, params: Any, *given: jax.Array) -> jax.Array:
    return model.apply({"params": params}, *given)


def forwards(model: Any, params: Any, theirs: Any, given: list, passed: dict, needed: float, rounds: int) -> dict:
    ours = done(jax.jit(functools.partial(forward, model)), params, *given)
    pair = Pair(ours, finished(lambda: theirs(**passed, return_dict=False)[0]), distance)
    return {"part": "forward", "error": agreed("forward", pair)} | timed(pair, needed, rounds)


def steps(model: Any, params: Any, theirs: Any, given: list, passed: dict, needed: float, rounds: int) -> dict:
    """AdamW on the mean square of the output; the parameters given are left as they are."""
    model, optimizer = model.clone(remat="attention"), optax.adamw(LR, weight_decay=0.01)
    kept = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    theirs.enable_gradient_checkpointing()
    theirs.train()
    adamw = torch.optim.AdamW(theirs.parameters(), LR, weight_decay=0.01)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, *given: jax.Array) -> tuple[Any, jax.Array]:
        own, opt = state

        def loss(own: Any) -> jax.Array:
            return jnp.mean(jnp.square(forward(model, own, *given).astype(jnp.float32)))

        value, grads = jax.value_and_grad(loss)(own)
        updates, opt = optimizer.update(grads, opt, own)
        return (optax.apply_updates(own, updates), opt), value

    own = jax.tree.map(jnp.copy, params)
    state = [(own, optimizer.init(own))]

    def ours() -> float:
        state[0], value = step(state[0], *given)
        return float(value)

    def run() -> torch.Tensor:
        adamw.zero_grad(set_to_none=True)
        loss = theirs(**passed, return_dict=False)[0].float().square().mean()
        loss.backward()
        adamw.step()
        return loss.detach()

    bound = 1e-3 if platform() == "cpu" else 0.05
    pair = Pair(ours, finished(run, grad=True), lambda mine, other: abs(mine - float(other)) / abs(float(other)))
    for _ in range(2):  # the second after a step of each
        error = pair.error(pair.ours(), pair.theirs())
        assert error <= bound, f"losses of ours and theirs differ by {error:.1e}"
    row = {"part": "train step", "error": float(f"{error:.1e}")} | timed(pair, needed, rounds)
    theirs.load_state_dict(kept)
    theirs.disable_gradient_checkpointing()
    theirs.eval()
    return row


def timed(pair: Pair, needed: float, rounds: int) -> dict[str, Any]:
    own, other = medians(pair, rounds)
    peak = flops.peak(jax.devices()[0].device_kind, dtypes()[0])
    row = {"ours_ms": round(1e3 * own, 1), "theirs_ms": round(1e3 * other, 1), "ratio": round(own / other, 2)}
    mfu = {"mfu": round(needed / own / peak, 3), "theirs_mfu": round(needed / other / peak, 3)} if peak else {}
    return row | {"tflop": round(needed / 1e12, 3), **mfu}


if __name__ == "__main__":
    main()
