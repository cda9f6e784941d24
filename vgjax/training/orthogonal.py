"""The nearest orthogonal matrices of Muon, roughly, by Newton-Schulz iterations (Jordan et al. 2024)."""

import jax.numpy as jnp
from einops import rearrange

from vgjax.parallel.sharding import platform
from vgjax.typing import Array, Float

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of x, x^3 and x^5; singular values end between .7 and 1.2
# From this ratio of the sides on, iterations on `x x^T` alone need fewer multiplications than those on `x`. They need
# true fp32, so only a CPU does them: other platforms multiply fp32 in less by default.
LONG = 1.5


def orthogonal(x: Float[Array, "b n m"], iterations: int) -> Float[Array, "b n m"]:
    """`U p(S) V^T` of matrices `U S V^T` whose singular values are at most 1; `p` nears 1 with each iteration."""
    if x.shape[1] > x.shape[2]:
        turned = orthogonal(rearrange(x, "b n m -> b m n"), iterations)
        return rearrange(turned, "b m n -> b n m")
    if platform() == "cpu" and x.shape[2] >= LONG * x.shape[1]:
        return _product(_squares(x), iterations) @ x
    for _ in range(iterations):
        x = _factor(_squares(x)) @ x
    return x


def _squares(x: Float[Array, "b n m"]) -> Float[Array, "b n n"]:
    return jnp.einsum("bnm,bkm->bnk", x, x)


def _factor(squares: Float[Array, "b n n"]) -> Float[Array, "b n n"]:
    """What one iteration multiplies a matrix by, from its `x x^T`."""
    a, b, c = COEFFICIENTS
    return a * jnp.eye(squares.shape[-1]) + b * squares + c * squares @ squares


def _product(squares: Float[Array, "b n n"], iterations: int) -> Float[Array, "b n n"]:
    """The factors of all iterations, multiplied; they are polynomials of one matrix and commute."""
    product = factor = _factor(squares)
    for _ in range(iterations - 1):
        squares = factor @ squares @ factor
        factor = _factor(squares)
        product = factor @ product
    return product
