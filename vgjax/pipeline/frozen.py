"""What lies frozen under a training: the VAE of a flow, kept in its workdir; the statistics of open weights."""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vgjax import experiment
from vgjax.data.storage import MANIFEST, fsync, writing
from vgjax.errors import UserError
from vgjax.nn.codec import stats_of
from vgjax.open import tune
from vgjax.open.families import is_open
from vgjax.parallel import distributed, sharding
from vgjax.parallel.layouts import Placement
from vgjax.training import checkpoint
from vgjax.typing import Json, PyTree


def prepared(config: ConfigDict, workdir: Path) -> tuple[ConfigDict, ConfigDict | None, PyTree]:
    """(the config, the config of the frozen VAE if there is one, what else is frozen) of a training."""
    return frozen_of(config, lambda path: own_vae(path, workdir))


def frozen_of(
    config: ConfigDict, read: Callable[[str], tuple[ConfigDict, PyTree]] | None = None
) -> tuple[ConfigDict, ConfigDict | None, PyTree]:
    """What `prepared` gives, with the VAE of a flow as `read` reads it (by default where it lies)."""
    kind, read = experiment.sections(config), read or (lambda path: frozen_vae(published_vae(path)))
    if kind == "vae":
        return config, None, {}
    if kind == "flow":
        if config.text.get("kind") == "frozen":
            conditioner, _ = experiment.text_of(config, jnp.float32)
            section = absolute(config.text.to_dict()) | {"sha256": conditioner.identity()}
            config = ConfigDict(config.to_dict() | {"text": section})
        return config, *read(config.vae)
    config, of_vae, stats = tune.adopt(config, experiment.KINDS)
    return config, of_vae, {"stats": stats}


def absolute(section: Json) -> Json:
    """A section with every `path` in it absolute: a checkpoint is sampled from other folders than it was trained in."""
    whole = {key: absolute(value) if isinstance(value, Mapping) else value for key, value in section.items()}
    return whole | ({"path": str(Path(whole["path"]).absolute())} if "path" in whole else {})


def frozen_vae(path: str | Path, where: Placement | None = None) -> tuple[ConfigDict, PyTree]:
    """(config of a trained VAE, `{"vae": EMA parameters, "stats": (mean, std)}`) from its checkpoint.

    They are whole on each device of a placement, or on one device.
    """

    def place(_: Json, tree: PyTree) -> PyTree:
        return sharding.abstract(tree, where)

    tree, meta, _ = checkpoint.load(path, items=("ema",), place=place)
    if "stats" not in meta:
        raise UserError(f"{path} holds no VAE with latent statistics: give the workdir of a finished VAE training")
    config = ConfigDict(meta["config"])
    vae = experiment.model("config.model", config.model, jnp.float32)
    clip = jnp.zeros((1, 1, vae.space_factor, vae.space_factor, 3))
    wanted = jax.eval_shape(lambda: sharding.unboxed(vae.init(jax.random.key(0), clip)["params"]))
    checkpoint.check_leaves(tree["ema"]["vae"], wanted, path)
    stats = stats_of(meta["stats"])
    return config, {"vae": tree["ema"]["vae"], "stats": sharding.whole(stats, where)}


def own_vae(path: str, workdir: Path) -> tuple[ConfigDict, PyTree]:
    """The frozen VAE of a flow, kept as `workdir/vae` from the first start on, so that the run never loses it.

    path: where it was trained, or a converted folder, whose published VAE it then is. Whoever calls this holds the
    workdir. `UserError` where `path` is there and holds another VAE than the one kept.
    """
    own, path = workdir / "vae", published_vae(path)
    if not distributed.agreed(lambda: bool(checkpoint.steps_at(own))):
        step = checkpoint.newest(path)
        config, frozen = frozen_vae(step)
        if jax.process_count() > 1:  # where one process cannot save alone, the files are copied
            distributed.agreed(lambda: _copy(step, own))
            return config, frozen
        stats = [np.asarray(row).tolist() for row in frozen["stats"]]
        meta = {"config": config.to_dict(), "stats": stats, "copy_of": _identity(step)}
        checkpoint.Checkpoints(own / checkpoint.SUBDIR).save(0, {"ema": {"vae": frozen["vae"]}}, meta, wait=True)
        return config, frozen
    step = checkpoint.newest(own)
    config, frozen = frozen_vae(step)
    known = (_identity(step), checkpoint.meta(step).get("copy_of"))
    if distributed.agreed(lambda: any(_identity(named) not in known for named in checkpoint.steps_at(path)[:1])):
        if checkpoint.digest(frozen_vae(path)[1]) != checkpoint.digest(frozen):
            raise UserError(
                f"config.vae={path} is another VAE than {own}, with which {workdir} is trained: go on with "
                f"--config.vae={own}, or start in another workdir"
            )
    return config, frozen


def published_vae(path: str | Path) -> Path:
    """Where the VAE of a converted folder lies, or of a training (where it is)."""
    return Path(path) / "vae" if is_open(Path(path)) else Path(path)


def _identity(step: Path) -> str:
    """sha256 of a step's manifest, which holds that of every file."""
    manifest = step / MANIFEST
    return hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else ""


def _copy(step: Path, own: Path) -> None:
    """Copies a step as the only one of `own`, which is there whole or not at all."""
    part = own.with_name(own.name + ".unfinished")
    with writing(own):
        for left in (part, own):
            shutil.rmtree(left, ignore_errors=True)
        shutil.copytree(step, part / checkpoint.SUBDIR / step.name)
        for entry in part.rglob("*"):
            fsync(entry)
        part.rename(own)
        fsync(own.parent)
