"""The training program: `python -m vgjax.train --config configs/quickstart.py:vae --workdir DIR`.

Top to bottom: read the config, place the mesh, open the data, restore or initialise the state, step, log, save. Started
again after any kind of death it continues bit-exactly, because every batch and every random number is a function of
(seed, step). Exit codes are those of `vgjax/errors.py`.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from vgjax import encode, evaluate, experiment
from vgjax.data import pipeline
from vgjax.data.embeddings import Embeddings
from vgjax.data.sources import Latents, Source, summary
from vgjax.data.storage import alone, writing
from vgjax.data.transforms import BadFiles
from vgjax.errors import Diverged, Preempted, UserError, door
from vgjax.open import tune
from vgjax.open.families import family_of
from vgjax.open.store import Store
from vgjax.open.texts import Remembered, identity
from vgjax.parallel import distributed, layouts, sharding
from vgjax.parallel.layouts import Placement
from vgjax.pipeline import opening
from vgjax.pipeline.frozen import prepared
from vgjax.pipeline.trained import settings_of
from vgjax.planner import flops
from vgjax.training import checkpoint, program, state, step
from vgjax.training.log import Log
from vgjax.typing import Json, PyTree

LOADED = ("drop_caption", "frames", "size", "fps", "workers", "threads", "timeout_s", "max_bad")
USAGE = "usage: python -m vgjax.train --config configs/quickstart.py:vae --workdir DIR [--config.key=value ...]"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The `train` section: how long, how often. A period of 0 means never.

    `watchdog`: seconds without a step after which the process prints its stacks and ends, to be restarted.
    """

    steps: int
    batch: int
    log_every: int = 20
    image_every: int = 0
    evaluate_every: int = 0
    save_every: int = 500
    keep_last: int = 3
    keep_every: int = 0
    max_dropped: int = 10
    watchdog: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            may_be_0 = field.name == "watchdog" or field.name.endswith("_every")
            floor = 0 if may_be_0 and field.name not in ("log_every", "save_every") else 1
            if getattr(self, field.name) < floor:
                raise UserError(f"config.train.{field.name}={getattr(self, field.name)} must be at least {floor}")


class Watch:
    """Notices dropped steps soon, without waiting for the step in flight: it looks two steps back."""

    def __init__(self, limit: int, log: Log):
        self.limit, self.log, self.pending = limit, log, deque()

    def add(self, number: int, ids: np.ndarray, metrics: PyTree) -> None:
        self.pending.append((number, ids, metrics["dropped"], metrics["dropped_in_a_row"]))
        if len(self.pending) > 2:
            self.look()

    def look(self) -> None:
        number, ids, dropped, in_a_row = self.pending.popleft()
        dropped, in_a_row = jax.device_get((dropped, in_a_row))
        if dropped[0]:
            self.log.event(number, "dropped", f"step {number} was not finite and is dropped; sample ids {ids.tolist()}")
            if int(in_a_row[0]) >= self.limit:
                raise Diverged(
                    f"{int(in_a_row[0])} steps in a row were not finite, the last of them {number}: look at the "
                    "samples named above, lower config.optim.lr or raise config.train.max_dropped"
                )

    def drain(self) -> None:
        while self.pending:
            self.look()


@door
def main(argv: list[str]) -> None:
    distributed.join()
    config, defaults, folder = program.read_config(argv, USAGE)
    workdir = program.workdir(folder)
    changed = experiment.difference(config, defaults)
    distributed.say(
        "\n".join(["config, as changed from the file:", *changed] if changed else ["config: the file's defaults"])
    )
    config = experiment.resolve(config, workdir)
    plan = experiment.call("config.train", Schedule, config.train)
    where = experiment.call("config.layout", layouts.find, config.layout)
    ready = distributed.preflight(config.to_dict(), checkpoint.versions(), where.mesh)
    with contextlib.ExitStack() as held, distributed.peers():
        distributed.agreed(lambda: held.enter_context(alone(workdir)))
        config, of_vae, frozen = prepared(config, workdir)
        built = experiment.build(config, of_vae)
        distributed.say(ready)
        held.enter_context(sharding.use(*where))
        check(built, plan)
        if jax.process_index() == 0:
            with writing(workdir):
                (workdir / "config.json").write_text(json.dumps(config.to_dict(), indent=1))
        run(built, plan, frozen, workdir, where)


def check(built: experiment.Experiment, plan: Schedule) -> None:
    """What would otherwise be found out after the data is rendered and encoded, or at the first picture."""
    config, data = built.config, experiment.data_of(built.config)
    objective = built.objective
    _, accumulate = experiment.players(config.optim, plan.steps, objective.players)
    evaluate.plan_of(config)
    shape = built.vae.latent_shape(data.frames, *data.size)
    if "known" in config and shape[0] == 1:
        raise UserError(
            f"config.known: clips of config.data.frames={data.frames} are one latent frame; when it is given "
            "nothing is left to make: take longer clips, or leave the section out"
        )
    if objective.begins_published:
        store = Store(Path(config.weights))
        family_of(store).settings(store, **tune.sampled(config.to_dict()))
    elif objective.of_latents:
        settings_of(config)
    objective.tokens(shape[:3])
    # Every micro-batch lies on all devices of the batch: on fewer, each would compute all of its rows.
    spread = sharding.degree("batch")
    if plan.batch % (spread * accumulate):
        unit = spread * accumulate
        near = [n for n in (plan.batch // unit * unit, -(-plan.batch // unit) * unit) if n]
        raise UserError(
            f"config.train.batch={plan.batch} does not divide into {unit}, the {spread} device(s) of "
            f"the batch times config.optim.accumulate={accumulate}: the nearest that do are "
            f"{' and '.join(map(str, near))}"
        )


def run(built: experiment.Experiment, plan: Schedule, frozen: PyTree, workdir: Path, where: Placement) -> None:
    config, objective, (layout, mesh) = built.config, built.objective, where
    frozen, stop = frozen | objective.frozen(), distributed.Stop()
    source, how, encoders = open_data(built, plan, frozen, workdir, where)
    rows = sharding.rows(plan.batch, layout, mesh)

    # 1. The state: abstract from the shapes of a batch, then restored, or born with its shardings.
    example = jax.eval_shape(objective.prepare, frozen, abstract_batch(built, source, plan.batch))
    players, accumulate = experiment.players(config.optim, plan.steps, objective.players)
    abstract, init = state.builder(objective, players, config.seed, example, layout, mesh)
    checkpoints = checkpoint.Checkpoints(workdir / checkpoint.SUBDIR, plan.keep_last, plan.keep_every or None)
    now, samples, base = begun(built, checkpoints, abstract, init, where)
    frozen = sharding.replicate(frozen, mesh) | base
    advance = step.make(objective, players, abstract, accumulate)

    # 2. What to show while it runs.
    start = int(now.step)
    log = Log(workdir, plan.steps, start, plan.log_every, **work(built, plan, example, abstract, frozen))
    count = state.parameter_count(abstract.params)
    log.event(start, "start", f"{count:,} parameters on {mesh.size} {jax.devices()[0].device_kind}")
    opened = functools.partial(opening.of_training, built, frozen, where, encoders)
    show = evaluate.Show(built, opened, functools.partial(first, source, how, rows, where), log)
    watch, dog = Watch(plan.max_dropped, log), distributed.Watchdog(plan.watchdog)

    def save(wait: bool) -> None:
        position = {"seed": config.seed, "step": number, "samples": samples + (number - start) * plan.batch}
        meta = {"config": config.to_dict(), "data": position, **show.statistics(now.ema)}
        checkpoints.save(number, now, meta, wait=wait)

    # 3. The steps. The data's position is a count of samples, so nothing of the loader needs saving.
    own = pipeline.batches(source, **how, start_step=samples // plan.batch, rows=rows)
    bad = BadFiles(how["bad_files"], settings=own.bad.settings)
    with log, contextlib.closing(own) as batches, checkpoints:
        for number in range(start + 1, plan.steps + 1):
            with log.waiting():
                raw = next(batches)
            begins = number == start + 1
            with dog.pause() if begins else contextlib.nullcontext():
                now, metrics = advance(now, frozen, sharding.place(raw, layout, mesh, plan.batch))
                if begins:
                    jax.block_until_ready(metrics)  # all processes compile, at their own pace
            watch.add(number, raw["id"], metrics)
            log.step(number, metrics, lambda: {"data/bad_files": bad.count, "data/restarts": own.restarts})
            dog.beat()
            last, stopping = number == plan.steps, stop.after(number)
            with _aside(log, dog) if last or stopping or _due(number, plan) else contextlib.nullcontext():
                if last or stopping or number % plan.save_every == 0:
                    watch.drain()
                    save(wait=last or stopping)
                if plan.image_every and (last or number % plan.image_every == 0) and not stopping:
                    show.images(number, now.ema)
                if plan.evaluate_every and number % plan.evaluate_every == 0 and not stopping:
                    show.scores(number, now.ema)
            if stopping and not last:
                raise Preempted(f"stopped by SIGTERM; step {number} is saved: start the same command again to continue")
    with dog.pause():  # all processes: the digest gathers
        distributed.say(f"done: step {int(now.step)}, state digest {checkpoint.digest(now)}")


def begun(
    built: experiment.Experiment,
    checkpoints: checkpoint.Checkpoints,
    abstract: PyTree,
    init: Callable[[PyTree | None], state.TrainState],
    where: Placement,
) -> tuple[state.TrainState, int, dict[str, PyTree]]:
    """(newest good state, or a fresh one; samples drawn before it; parameters that stay frozen)."""
    fresh = checkpoints.latest() is None
    given, base = published(built, fresh, checkpoints.directory.parent, where)
    now, samples = (init(given), 0) if fresh else restored(checkpoints, abstract, built.config)
    return now, samples, base


def published(
    built: experiment.Experiment, fresh: bool, workdir: Path, where: Placement
) -> tuple[PyTree | None, dict[str, PyTree]]:
    """Of open weights: (parameters that a fresh run begins with, None for random ones; those that stay frozen)."""
    objective, config = built.objective, built.config
    if not objective.begins_published or not (fresh or objective.adapted):
        return None, {}
    store, known = Store(Path(config.weights), where=where), workdir / "weights.sha256"
    own = identity(store, config.component)
    if fresh and jax.process_index() == 0:
        with writing(known):
            known.write_text(own)
    if not fresh and known.read_text() != own:
        raise UserError(
            f"{config.weights} holds another {config.component} than the one whose adapters {workdir} trains: give it "
            "the folder that it began with, or start in another workdir"
        )
    _, params, _ = store.read(config.component)
    return (None, {"base": params}) if objective.adapted else ({"velocity": params}, {})


def restored(checkpoints: checkpoint.Checkpoints, abstract: PyTree, config: ConfigDict) -> tuple[state.TrainState, int]:
    """(newest good state, samples drawn before it), refused where the data would not go on where it stopped."""
    now, meta, number = checkpoints.restore(abstract)
    before = meta["data"]["seed"]
    if before != config.seed:
        raise UserError(
            f"{checkpoints.directory} was trained with config.seed={before} until step {number}, not {config.seed}: "
            "go on with that seed, or start in another workdir"
        )
    samples, batch = meta["data"]["samples"], config.train.batch
    if samples % batch:
        raise UserError(
            f"config.train.batch={batch}: {checkpoints.directory} goes on behind {samples} samples, no multiple of it: "
            f"go on with {meta['config']['train']['batch']}, or start in another workdir"
        )
    return now, samples


def open_data(
    built: experiment.Experiment, plan: Schedule, frozen: PyTree, workdir: Path, where: Placement
) -> tuple[Source, Json, Remembered | None]:
    """(source, how to draw batches from it, frozen encoders that remember what will be shown).

    A flow reads latents, encoded once, unless `config.latents` is empty.
    """
    config, data = built.config, experiment.data_of(built.config)
    source = experiment.source(config)
    distributed.say(summary(source))
    bad = workdir / f"bad_files{jax.process_index() or ''}.jsonl"
    how = {
        "seed": config.seed,
        "batch": plan.batch,
        "conditioner": built.conditioner,
        "bad_files": bad,
        **{name: getattr(data, name) for name in LOADED},
    }
    encoders = built.conditioner.placed(where) if built.conditioner and built.conditioner.frozen else None
    if built.conditioner:
        encode.say_cut(built.conditioner, source)
    if built.objective.of_latents and (config.latents or encoders):
        if not config.latents:
            raise UserError(
                "config.latents is empty: latents and what frozen encoders make of the captions are encoded once, into "
                "this folder: give one, as '{workdir}/../latents'"
            )
        if jax.process_count() > 1 and not Path(config.latents).exists():
            raise UserError(
                f"config.latents={config.latents} does not exist: a job of several processes reads latents that "
                "`python -m vgjax.encode` wrote before"
            )
        by = encode.By(opening.codec_of(built, frozen, where), encoders)
        encode.ensure(source, config.data, by, Path(config.latents), bad)
        source, how["workers"] = Latents(Path(config.latents)), 0
    if encoders is None:
        return source, how, None
    how["conditioner"], remembered = Embeddings(Path(config.latents)), Remembered(encoders)
    if plan.image_every or plan.evaluate_every:  # now: later the devices are full
        remembered(evaluate.shown(config, evaluate.plan_of(config)))
    return source, how, remembered


def abstract_batch(built: experiment.Experiment, source: Source, count: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of `count` rows as the loader would give it: nothing is read for its shapes."""
    data = built.config.data
    shape, dtype = (data.frames, *data.size, 3), np.uint8
    if source.kind == "latent":
        shape, dtype = source.meta["shape"], np.float32
    numbers = {"index": np.uint32, "id": np.int32}
    return {
        source.kind: jax.ShapeDtypeStruct((count, *shape), dtype),
        **({"context": built.conditioner.abstract(count)} if built.conditioner else {}),
        **{name: jax.ShapeDtypeStruct((count,), of) for name, of in numbers.items()},
    }


def first(source: Source, how: Json, rows: tuple[int, int], where: Placement, count: int = 4) -> Iterator[PyTree]:
    """The run's first batches, placed; of each this process reads its own rows alone."""
    with contextlib.closing(pipeline.batches(source, **how, rows=rows)) as batches:
        for raw in itertools.islice(batches, count):
            yield sharding.place(raw, *where, how["batch"])


def work(
    built: experiment.Experiment, plan: Schedule, example: PyTree, abstract: state.TrainState, frozen: PyTree
) -> Json:
    """What one step does, for the rates of the log; FLOPs are those that what is trained needs."""
    data, objective = built.config.data, built.objective
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), abstract.params)
    frozen = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), frozen)
    key = jax.eval_shape(lambda: jax.random.key(0))
    with sharding.off():  # heads or tokens that a layout pads are no model FLOPs
        own = frozen | params
        forward = sum(
            flops.count(lambda p, batch, key, name=name: objective.loss(name, p, batch, key)[0], own, example, key)
            for name in objective.players
        )
    tokens = 0
    if objective.of_latents:
        tokens = plan.batch * (objective.tokens(example["x"].shape[1:4]) + example["context"].tokens)
    devices = jax.devices()[: built.config.layout.get("devices", 0) or None]
    dtype = experiment.compute_dtype(built.config.precision)
    peaks = [flops.peak(device.device_kind, dtype) for device in devices]
    total = None if None in peaks else sum(peaks)
    return {
        "samples": plan.batch,
        "frames": plan.batch * data.frames,
        "tokens": tokens,
        "flops": flops.training(forward, objective.adapted),
        "peak": total,
    }


@contextlib.contextmanager
def _aside(log: Log, dog: distributed.Watchdog) -> Iterator[None]:
    """Neither the step clock nor the watchdog looks at what is shown and saved."""
    with log.pause(), dog.pause():
        yield


def _due(number: int, plan: Schedule) -> bool:
    """Whether something other than a step happens after this one."""
    return any(period and number % period == 0 for period in (plan.image_every, plan.evaluate_every, plan.save_every))


if __name__ == "__main__":
    program.start()
    main()
