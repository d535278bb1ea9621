"""Rows of x to int8 in the coordinates of a weight whose features were smoothed and rotated, in one launch.

    y = (x * smooth) H,    q = round(y / scale),    scale = max(abs(y)) / 127 of each row

H has the Hadamard matrix of `block` features along its diagonal: a small product on tensor cores, between loading a row
and finding its largest value. Those multiply in bfloat16, so each value is written as a sum of three of them, which has
all 24 bits of float32; the entries of the matrix are 1 and -1, exact in any float.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels._numerics import INT8_MAX, abs_bits, round_to_int, scale_of
from pallas_kernels.triton import _pallas
from pallas_kernels.triton.quantize_rows import QuantizedRows

# Blocks of features that the kernel rotates: tensor cores need 16, and with 128 registers spill. 1 is smoothing alone.
ROTATED_BLOCKS = (1, 16, 32, 64)
_HELD = 8192  # values of a row that a program holds in registers at once, at most
_LEAST_ROWS = 16  # of an operand of tensor cores


def _rotate_rows_kernel(
    x_ref,  # [m, k]
    smooth_ref,  # [k]
    q_ref,  # [m, k]
    factors_ref,  # [1, m]
    *,
    block: int,
    width: int,
    count: int,
):
    """One program per row. A tile of it is `count` blocks of features, as the rows of a matrix."""
    m, k = x_ref.shape
    row, steps = jnp.full((1, 1), pl.program_id(0), jnp.int32), pl.cdiv(k, count * width)
    matrix = _signs(width) if block > 1 else None

    def tile(i):
        """The features of some blocks, int32 [count, width], and the row's values there, smoothed and rotated."""
        # Load a part of the row, zeros past its end, and scale each feature.
        cols = _pallas.span(i * count, count)[:, None] * width + _pallas.span(0, width)[None, :]
        x = _pallas.load(x_ref, (row, cols), mask=cols < k).astype(jnp.float32)
        x = x * _pallas.load(smooth_ref, (cols,), mask=cols < k)
        if matrix is None:
            return cols, x
        # Rotate each block: the sum of the products of three parts, of which each has 8 more bits of x.
        y = jnp.zeros((count, width), jnp.float32)
        for _ in range(3):
            part = x.astype(jnp.bfloat16)
            y += lax.dot_general(part, matrix, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
            x -= part.astype(jnp.float32)
        return cols, y * (1 / math.sqrt(block))

    if steps == 1:  # Both passes see one tile, which stays in registers.
        tile = functools.cache(tile)

    def loop(body, init):
        return body(0, init) if steps == 1 else lax.fori_loop(0, steps, body, init)

    # First pass: the row's largest value. Elementwise over tiles; the reduction comes once.
    tops = loop(lambda i, top: jnp.maximum(top, abs_bits(tile(i)[1])), jnp.zeros((count, width), jnp.int32))
    scale = scale_of(jnp.max(jnp.max(tops, axis=1)), INT8_MAX)
    _pallas.store(factors_ref, (jnp.zeros((1, 1), jnp.int32), row), jnp.full((1, 1), scale), mask=row < m)

    # Second pass: quantize.
    def quantize(i, carry):
        cols, y = tile(i)
        _pallas.store(q_ref, (row, cols), round_to_int(y, scale).astype(jnp.int8), mask=cols < k)
        return carry

    loop(quantize, 0)


def _signs(size: int) -> jax.Array:
    """Sylvester's Hadamard matrix: the entry (i, j) is -1 to the number of bits that i and j both have."""
    both = _pallas.span(0, size)[:, None] & _pallas.span(0, size)[None, :]
    for shift in (4, 2, 1):  # the parity of up to 8 bits
        both = both ^ (both >> shift)
    return jnp.where((both & 1) == 0, 1.0, -1.0).astype(jnp.bfloat16)


def rotate_rows(
    x: jax.Array, smooth: jax.Array, block: int, *, height: int = 1, interpret: bool = False
) -> QuantizedRows:
    """Smooths, rotates and quantizes each row, all of which is kept: there are no outliers after it.

    `factors[0] = max(abs(y)) / 127`, `q = round_half_even(y / factors[0])`, with `y = (x * smooth) H`.

    Args:
      x: float[m, k], m and k at least 1.
      smooth: float32[k], factors of the features.
      block: how many features are rotated together, of `ROTATED_BLOCKS`; it divides k.
      height: allocate rows for a multiple of it, those after the last one uninitialised.
      interpret: run in Pallas's interpret mode.

    Returns:
      `QuantizedRows`. The factors of a row with a value that isn't finite, or above 3.38e38, are NaN.

    Raises:
      ValueError: another block, or one that doesn't divide k.

    Examples:
      >>> x = jnp.zeros((1, 16)).at[0, 0].set(2.0)
      >>> rows = rotate_rows(x, jnp.ones(16), 16, interpret=True)
      >>> set(rows.q[0].tolist()), round(float(rows.factors[0, 0] * 127), 6)
      ({127}, 0.5)

    References:
      QuaRot, section 3 (https://arxiv.org/abs/2404.00456), for the rotation.
    """
    m, k = x.shape
    if block not in ROTATED_BLOCKS or k % block:
        raise ValueError(f"Expected block to be one of {ROTATED_BLOCKS} that divides k = {k}, got {block}")
    width = block if block > 1 else 64
    count = min(_HELD // width, max(_LEAST_ROWS, pl.next_power_of_2(pl.cdiv(k, width))))
    allocated = pl.cdiv(m, height) * height
    q, factors = _pallas.call(
        functools.partial(_rotate_rows_kernel, block=block, width=width, count=count),
        (m,),
        [x, smooth],
        [jax.ShapeDtypeStruct((allocated, k), jnp.int8), jax.ShapeDtypeStruct((1, allocated), jnp.float32)],
        num_warps=max(1, min(8, count * width // 1024)),
        num_stages=1,
        interpret=interpret,
    )
    return QuantizedRows(q, factors)
