"""Sampling from a converted folder: each model comes onto the devices, does its part, and goes again."""

import dataclasses
import functools
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vgjax.errors import UserError
from vgjax.flow.guidance import cfg as guide
from vgjax.flow.path import noise, retimed, seeded, stepper_keys
from vgjax.flow.steppers import State, Velocity, advance, named
from vgjax.nn.codec import check_finite, decode_tiled, from_unit, stats_of
from vgjax.objectives.vae import to_uint8
from vgjax.open import hunyuan_video, wan
from vgjax.open.stage import Settings
from vgjax.open.store import INDEX, Store
from vgjax.open.texts import Texts, embed
from vgjax.parallel.distributed import fetch
from vgjax.typing import Array, Float, PyTree, UInt8

FAMILIES = {"HunyuanVideoPipeline": hunyuan_video, "WanPipeline": wan, "WanImageToVideoPipeline": wan}


def is_open(path: Path) -> bool:
    """Whether this is a converted folder."""
    return (path / INDEX).is_file()


@dataclasses.dataclass(frozen=True)
class OpenSampler:
    """A converted folder ready to sample: call it with prompts."""

    store: Store

    @property
    def family(self) -> Any:
        """The file of the family that the folder's pipeline belongs to."""
        name = self.store.index.get("_class_name")
        if name not in FAMILIES:
            raise UserError(f"{self.store.folder / INDEX} is a {name}: known are {', '.join(FAMILIES)}")
        return FAMILIES[name]

    def __call__(
        self,
        prompts: Sequence[str],
        seed: int = 0,
        negative: str | None = None,
        image: UInt8[np.ndarray, "h w 3"] | None = None,
        tile: int = 0,
        **changed: Any,
    ) -> UInt8[np.ndarray, "n t h w 3"]:
        """Videos of `prompts`; sample i's noise depends on `(seed, i)` alone.

        negative: None for the family's own; image: the first frame, for models that take one; tile: see `decode`;
        changed: fields of `Settings`, which default to what was published.
        """
        family, store = self.family, self.store
        use = family.settings(store, **changed)
        if negative is not None and all(scale == 1.0 for scale in use.cfg):
            raise UserError(
                "--negative has no effect at --cfg 1, which guides away from nothing: give --cfg above 1 (twice the "
                "time), or leave --negative out"
            )
        key, shape = seeded(seed), self.latent_shape(use.frames, use.size)
        texts = self.embed(prompts, use, negative)
        given = family.condition(store, image, use.frames, use.size)
        starts = noise(key, jnp.arange(len(prompts), dtype=jnp.uint32), shape)
        z = self.latents(texts, starts, use, given, seed)
        check_finite(np.isfinite(z).all(axis=(1, 2, 3, 4)), prompts)
        frames = self.frames(z, tile)
        check_finite(np.isfinite(frames).all(axis=(1, 2, 3, 4)), prompts)
        return np.asarray(to_uint8(jnp.asarray(frames)))

    def embed(self, prompts: Sequence[str], use: Settings, negative: str | None = None) -> tuple[Texts, Texts | None]:
        """What `latents` takes: of the prompts, and of the negative prompt for each, None without computed guidance."""
        guided = any(scale != 1.0 for scale in use.cfg)
        other = [self.family.NEGATIVE if negative is None else negative] * (len(prompts) if guided else 0)
        both, n = embed(self.store, self.family, [*prompts, *other]), len(prompts)
        return jax.tree.map(lambda x: x[:n], both), jax.tree.map(lambda x: x[n:], both) if guided else None

    def latent_shape(self, frames: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """`t h w c` of a video's latents; a `UserError` for a size that the models cannot make."""
        vae, model = (self.store.module(self.store.published(name), name) for name in ("vae", "transformer"))
        height, width = units = [vae.space_factor * patch for patch in model.patch[1:]]
        if any(side < unit or side % unit for side, unit in zip(size, units, strict=True)):
            near = (max(unit, unit * round(side / unit)) for side, unit in zip(size, units, strict=True))
            raise UserError(
                f"a video of {'x'.join(map(str, size))} pixels (height x width) does not divide into patches of "
                f"{height}x{width} pixels; the nearest that does is {'x'.join(map(str, near))}"
            )
        shape = vae.latent_shape(frames, *size)
        model.tokens(shape[:3])
        return shape

    def latents(
        self,
        texts: tuple[PyTree, PyTree],
        starts: Float[Array, "n t h w c"],
        use: Settings,
        given: PyTree,
        seed: int = 0,
    ) -> Float[Array, "n t h w c"]:
        """Unit-scale latents that the noise `starts` becomes, stage by stage, one video at a time.

        texts: what `embed` made of the prompts, and of the negative prompts (None without guidance); given: what
        `condition` made of an image; seed: of what a stepper draws, for sample i of `(seed, i)` alone.
        """
        family = self.family
        # On the host: the devices of a layout take nothing that lies on one of them.
        texts, given, each = jax.tree.map(np.asarray, (texts, given, list(starts)))
        index = jnp.arange(len(each), dtype=jnp.uint32)
        keys = np.asarray(jax.random.key_data(stepper_keys(seeded(seed), index)))
        # The stepper goes on from one model to the next, as one scheduler does in the published pipelines.
        each = [(x[None], None) for x in each]
        for stage in family.stages(self.store, use):
            if len(stage.schedule.times) < 2:
                continue
            with self.store.here(), self.store.variables(stage.name) as (model, variables):
                for i, (x, state) in enumerate(each):
                    own = texts[:1] if stage.cfg == 1.0 else texts
                    both = jax.tree.map(lambda *a, i=i: np.stack([one[i] for one in a]), *own)
                    told = family.velocity, model, use, stage.cfg
                    times = stage.schedule.times, stage.schedule.told
                    each[i] = fetch(follow(*told, variables, both, given, x, keys[i : i + 1], state, *times))
        return family.finished(jnp.concatenate([x for x, _ in each]), given)

    def decode(self, z: Float[Array, "n t h w c"], tile: int = 0) -> UInt8[np.ndarray, "n s i j 3"]:
        """Pixels of unit-scale latents."""
        return np.asarray(to_uint8(jnp.asarray(self.frames(z, tile))))

    def frames(self, z: Float[Array, "n t h w c"], tile: int = 0) -> Float[np.ndarray, "n s i j 3"]:
        """Frames in about [-1, 1], one video at a time, as published or in tiles of `tile` latent positions a side."""
        parts = []
        with self.store.here(), self.store.model("vae") as (vae, params, meta):
            for one in np.split(np.asarray(from_unit(z, stats_of(meta["stats"]))), len(z)):
                one = self.store.put(one)
                if tile and tile < max(one.shape[2:4]):
                    video = decode_tiled(vae, params, one, tile, tile // 4, self.family.decode, fetch)
                else:
                    video = self.family.decode(vae, params, one)
                parts.append(fetch(video))
        return np.concatenate(parts)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def follow(
    velocity: Callable[..., Velocity],
    model: Any,
    use: Settings,
    cfg: float,
    variables: PyTree,
    texts: PyTree,
    given: PyTree,
    x: Array,
    keys: Array,
    state: State | None,
    times: Array,
    told: Array,
) -> tuple[Array, State]:
    """`x` from the first to the last of `times`, where the model is told `told`, and the stepper's state there.

    With guidance the texts are doubled, the prompts first. keys: their data, one a sample; state: None at the start.
    """
    v = retimed(velocity(model, variables, texts, use.guidance, given), times, told)
    v = guide(v, cfg, use.interval, use.rescale) if cfg != 1.0 else v
    stepper, x = named(use.stepper), x.astype(jnp.float32)
    # What one model remembers means nothing to the next.
    state = stepper.init(x, jax.random.wrap_key_data(keys)) if state is None else state._replace(memory=None)
    return advance(stepper, v, x, times, state)


def peak() -> str:
    """The most memory that host and devices held so far."""
    said = [f"host {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"]
    told = [device.memory_stats() or {} for device in jax.local_devices()]
    if used := [stats["peak_bytes_in_use"] for stats in told if "peak_bytes_in_use" in stats]:
        said.append(f"a device {max(used) / 2**30:.1f} GiB")
    return "peak memory: " + ", ".join(said)
