"""The straight path of rectified flow (Liu et al. 2022; Lipman et al. 2022): noise at t=0, data at t=1."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce

from vgjax.errors import UserError
from vgjax.flow.steppers import Velocity
from vgjax.typing import Array, Float, Key, PyTree, UInt


@dataclasses.dataclass(frozen=True)
class Straight:
    """`x_t = (1-t) noise + t data`, velocity `data - noise`."""

    def mix(
        self, noise: Float[Array, "b ..."], data: Float[Array, "b ..."], t: Float[Array, " b"]
    ) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
        """(x_t, velocity), fp32."""
        t = jnp.expand_dims(t, tuple(range(1, data.ndim)))
        return (1.0 - t) * noise + t * data, data - noise


def errors(
    v: Velocity,
    x: Float[Array, "b ..."],
    t: Float[Array, " b"],
    keys: Key,
    path: Straight = Straight(),
    where: Float[Array, "b ..."] | None = None,
) -> Float[Array, " b"]:
    """Squared velocity error of each sample at its time `t`, with noise from its key; the mean of where `where` is
    1."""
    noise = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(keys)
    mixed, velocity = path.mix(noise, x, t)
    out, _ = v(mixed, t, None)
    square = jnp.square(out.astype(jnp.float32) - velocity)
    if where is None:
        return reduce(square, "b ... -> b", "mean")
    where = jnp.broadcast_to(where, square.shape)
    return reduce(where * square, "b ... -> b", "sum") / reduce(where, "b ... -> b", "sum")


def precondition(network: Velocity) -> Velocity:
    """The velocity of a network that predicts, at unit variance, what the best linear guess leaves over.

    For data and noise of unit variance the best guess of `data - noise` that is linear in `x_t` is `c x_t` with
    `c = (2t - 1) / s`, `s = t^2 + (1-t)^2`, and its error has variance `1 / s`: so `v = c x_t + network / sqrt(s)`. The
    network is then asked for data where there is only noise and for noise where there is only data, as in Karras et
    al. 2022 (section 5) and the v-prediction of Salimans & Ho 2022, and never for a copy of its input.
    """

    def v(x: Float[Array, "b ..."], t: Float[Array, "..."], memory: PyTree) -> tuple[Float[Array, "b ..."], PyTree]:
        at = jnp.expand_dims(jnp.broadcast_to(t, x.shape[:1]), tuple(range(1, x.ndim)))
        s = jnp.square(at) + jnp.square(1.0 - at)
        rest, memory = network(x, t, memory)
        return (2.0 * at - 1.0) / s * x + jax.lax.rsqrt(s) * rest, memory

    return v


def check_seed(where: str, seed: int) -> None:
    """UserError for what is not a whole number of 64 bits; `where` names the option."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
        raise UserError(f"{where}={seed} must be a whole number, at least 0 and less than 2^64")


def seeded(seed: int) -> Key:
    """The key of a seed in [0, 2^64). All 64 bits count; below 2^32 it is `jax.random.key(seed)`."""
    check_seed("seed", seed)
    # Without 64-bit types jax.random.key takes the lower 32 bits alone.
    words = np.array([int(seed) >> 32, int(seed) & 0xFFFFFFFF], np.uint32)
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def sample_keys(key: Key, index: UInt[Array, " b"]) -> Key:
    """One key a sample, from the global sample index alone: the same on any number of devices or micro-batches."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def stepper_keys(key: Key, index: UInt[Array, " b"]) -> Key:
    """What a stepper draws from, one key a sample: apart from what the sample starts from."""
    return sample_keys(jax.random.fold_in(key, 1), index)


def noise(key: Key, index: UInt[Array, " b"], shape: tuple[int, ...]) -> Float[Array, "b ..."]:
    """What each sample starts from, of its global index alone."""
    return jax.vmap(lambda one: jax.random.normal(one, shape))(sample_keys(key, index))


def reverse(network: Velocity) -> Velocity:
    """The velocity of a network that counts the other way: 1 is noise, and it points from data to noise."""

    def v(x: Float[Array, "b ..."], t: Float[Array, "..."], memory: PyTree) -> tuple[Float[Array, "b ..."], PyTree]:
        slope, memory = network(x, 1.0 - t, memory)
        return -slope, memory

    return v


def retimed(network: Velocity, times: Float[Array, " k"], told: Float[Array, " k"]) -> Velocity:
    """The velocity of a network that is told the time `told[i]` where it is asked for `times[i]`, linear in between."""

    def v(x: Float[Array, "b ..."], t: Float[Array, "..."], memory: PyTree) -> tuple[Float[Array, "b ..."], PyTree]:
        return network(x, jnp.interp(t, times, told), memory)

    return v
