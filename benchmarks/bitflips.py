"""Does a damaged checkpoint get noticed, and is the newest good step used?

    python benchmarks/bitflips.py --flips 200

Saves two steps of a small training state, then damages the newer one again and again: one random bit of one random
file (the manifest included), every file cut, every file deleted. Each time the run must restore the older step, bit
for bit. For comparison the same flips are read by Orbax alone. Also times saves of a state of 3 M parameters with EMA
and Adam moments. Writes benchmarks/results/bitflips.json.
"""

import argparse
import contextlib
import io
import logging
import os
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from record import write

from vgjax.data import storage
from vgjax.training import checkpoint
from vgjax.training.checkpoint import Checkpoints, digest


def state(step: int, width: int = 64, blocks: int = 4) -> dict:
    keys = jax.random.split(jax.random.key(step), blocks)
    params = {f"block{i}": {"kernel": jax.random.normal(k, (width, 8 * width))} for i, k in enumerate(keys)}
    return {"step": jnp.int32(step), "params": params, "ema": params, "opt": optax.adamw(1e-3).init(params)}


def abstract(tree: dict) -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def recovers(root: Path, wanted: dict, digests: dict[int, str]) -> bool:
    """Whether step 2 was noticed as damaged and named, and step 1 restored bit for bit."""
    with contextlib.redirect_stderr(io.StringIO()) as told:
        tree, _, step = Checkpoints(root).restore(wanted)
    return step == 1 and digest(tree) == digests[1] and "is damaged" in told.getvalue()


def orbax_alone(folder: Path, wanted: dict, right: str) -> str:
    """What reading the damaged arrays without the manifest gives."""
    try:
        return "right" if digest(checkpoint._read(folder, wanted)) == right else "silently wrong"
    except Exception:
        return "error"


def damage(root: Path, flips: int, seed: int) -> dict:
    saver, good, rng = Checkpoints(root / "good"), root / "good", random.Random(seed)
    digests = {step: digest(state(step)) for step in (1, 2)}
    wanted = abstract(state(1))
    for step in digests:
        saver.save(step, state(step), {"config": {"blocks": 4}, "data": {"seed": 0, "step": step}})
    saver.finish()
    files = sorted(path.relative_to(good) for path in (good / "00000002").rglob("*") if path.is_file())
    solid = [path for path in files if (good / path).stat().st_size]

    def trial(spoil, compare: bool = False) -> tuple[bool, str]:
        copy = Path(shutil.copytree(good, root / "copy"))
        spoil(copy)
        alone = orbax_alone(copy / "00000002", wanted, digests[2]) if compare else ""
        found = recovers(copy, wanted, digests)
        shutil.rmtree(copy)
        return found, alone

    def cut(path: Path) -> None:
        os.truncate(path, rng.randrange(path.stat().st_size))

    sizes = [(good / path).stat().st_size for path in solid]
    # Half of the flips choose a file first, so that small ones are hit too; half choose among all bytes.
    victims = [rng.choice(solid) if n % 2 else rng.choices(solid, sizes)[0] for n in range(flips)]
    bits = [trial(lambda copy, victim=victim: flip(copy / victim, rng), compare=True) for victim in victims]
    cuts = [trial(lambda copy, victim=victim: cut(copy / victim))[0] for victim in solid]
    gone = [trial(lambda copy, victim=victim: (copy / victim).unlink())[0] for victim in files]
    alone = [outcome for (_, outcome), victim in zip(bits, victims, strict=True) if checkpoint.STATE in victim.parts]
    return {
        "bit flips": f"{sum(found for found, _ in bits)} of {flips} noticed, the older step used",
        "files cut": f"{sum(cuts)} of {len(solid)}",
        "files deleted": f"{sum(gone)} of {len(files)}",
        "flips in Orbax's files, read by Orbax alone": {
            kind: alone.count(kind) for kind in ("silently wrong", "right", "error")
        },
        "all noticed": all(found for found, _ in bits) and all(cuts) and all(gone),
    }


def speed(root: Path, repeats: int = 7) -> dict:
    tree = state(0, width=216, blocks=8)
    jax.block_until_ready(tree)
    saver, blocked, total = Checkpoints(root, keep_last=1), [], []
    for step in range(repeats):
        start = time.perf_counter()
        saver.save(step, tree, {})
        blocked.append(time.perf_counter() - start)
        saver.finish()
        total.append(time.perf_counter() - start)
    start = time.perf_counter()
    assert not storage.verify(root / f"{repeats - 1:08d}")
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(tree["params"])),
        "state MB": round(sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 1e6, 1),
        "save blocks ms (median)": round(1e3 * statistics.median(blocked), 1),
        "save complete ms (median)": round(1e3 * statistics.median(total), 1),
        "verify ms": round(1e3 * (time.perf_counter() - start), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)  # what Orbax says about the files that it reads without their manifest
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "command": f"python benchmarks/bitflips.py --flips {args.flips} --seed {args.seed}",
            **damage(Path(folder) / "damage", args.flips, args.seed),
            "save speed": speed(Path(folder) / "speed"),
        }
    write("bitflips", result)
    raise SystemExit(0 if result["all noticed"] else 1)


if __name__ == "__main__":
    main()
