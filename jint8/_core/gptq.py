"""GPTQ: weights are rounded one feature after another, and those that are left make up for the error so far.

The error of a product's output, over calibration activations `x`, is `sum (dw @ x)**2 = trace(dw H dw.T)` with the
second moments `H = E[x x.T]`. Rounding feature i by `e` has the least error where the features that follow change by
`-e * U[i, j] / U[i, i]`, with `H**-1 = U.T U` and `U` upper triangular; the error it leaves is `(e / U[i, i])**2`.
Features with large activations go first, while there are others left to make up for them.

Source: Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, arXiv
2210.17323, section 3 and algorithm 1.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jint8._core.four_bits import codes_of, group_count, of_members, ranges

DAMPING = 0.1  # of the mean of H's diagonal, which is added to it: texts to come differ from the calibration one
BLOCK = 64  # features whose corrections are applied one at a time; those that follow get them all at once


class InOrder(NamedTuple):
    """What `round_in_order` finds, for features in its order."""

    corrected: jax.Array  # [k, n]: the weights with all corrections, from which the codes were rounded
    codes: jax.Array  # uint8[k, n]
    of_groups: jax.Array | None  # float16[2, k, n / run, groups]: steps and minima, unless they were given
    errors: jax.Array  # of each channel's output, in units of its scale squared: [n]


def inverse_factor(moments: np.ndarray, order: np.ndarray) -> np.ndarray:
    """`U` of the damped second moments `[k, k]` of features in this order, in float32."""
    from scipy import linalg  # which takes a while to import

    h = np.array(moments[np.ix_(order, order)], np.float64)
    diagonal = np.einsum("ii->i", h)
    diagonal += DAMPING * (np.mean(diagonal) or 1.0)
    # From the last feature to the first, H = R R.T with R upper triangular: then U is the inverse of R.
    upper = linalg.cholesky(h[::-1, ::-1], lower=True, overwrite_a=True)[::-1, ::-1]
    return linalg.solve_triangular(upper, np.eye(len(h)), overwrite_b=True).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("group", "run"))
def round_in_order(
    w: jax.Array,
    factor: jax.Array,
    rounded: jax.Array,
    steps: jax.Array | None,
    lows: jax.Array | None,
    *,
    group: int,
    run: int,
) -> InOrder:
    """Rounds the features of `w[k, n]` to codes, from the first to the last.

    Args:
      w: float32 `[k, n]`, in units of the channels' scales.
      factor: `U`, of these features in this order, float32 `[k, k]`.
      rounded: bool `[k]`: which features are rounded. The others only make up for them.
      steps: of each weight, `[k, n]`. None: those of groups along the channels, found when their feature's turn comes.
      lows: the minima, likewise.
      group: how many channels of a feature share a step, where that is to be found.
      run: how many consecutive channels are cut into such groups.
    """
    k, n = w.shape
    padding = -k % BLOCK
    w = jnp.pad(w, ((0, padding), (0, 0)))
    rounded = jnp.pad(rounded, (0, padding))
    numbers = jnp.arange(k + padding)
    factor = jnp.pad(factor, ((0, padding), (0, padding))) + jnp.diag(jnp.where(numbers >= k, 1.0, 0.0))
    of_groups = None
    if steps is None:
        of_groups = jnp.zeros((2, k + padding, n // run, group_count(run, group)), jnp.float16)
    else:
        assert lows is not None
        steps, lows = (jnp.pad(a, ((0, padding), (0, 0))) for a in (steps, lows))

    def block(number, carry):
        w, codes, of_groups, errors = carry
        start = number * BLOCK
        rows = lax.dynamic_slice_in_dim(factor, start, BLOCK)
        own = lax.dynamic_slice_in_dim(rows, start, BLOCK, axis=1)

        def feature(i, carry):
            w_block, codes, of_groups, errors = carry
            row = w_block[i]
            if steps is None or lows is None:
                found = ranges(row.reshape(-1, run), 1, group, jnp.ones(()))
                of_groups = of_groups.at[:, start + i].set(jnp.stack(found))
                step, low = (of_members(a, 1, run, group).reshape(-1) for a in found)
            else:
                step, low = steps[start + i], lows[start + i]
            code = codes_of(row, step, low)
            off = row - (code * step.astype(jnp.float32) + low.astype(jnp.float32))
            error = jnp.where(rounded[start + i], off, 0) / own[i, i]
            w_block = w_block - own[i][:, None] * error
            return w_block, codes.at[start + i].set(code), of_groups, errors.at[i].set(error)

        w_block = lax.dynamic_slice_in_dim(w, start, BLOCK)
        carry = w_block, codes, of_groups, jnp.zeros_like(w_block)
        w_block, codes, of_groups, of_block = lax.fori_loop(0, BLOCK, feature, carry)
        later = jnp.where(numbers >= start + BLOCK, rows, 0)
        w = lax.dynamic_update_slice_in_dim(w, w_block, start, 0)
        w = w - lax.dot_general(later, of_block, (((0,), (0,)), ((), ())), lax.Precision.HIGHEST)
        return w, codes, of_groups, errors + jnp.sum(jnp.square(of_block), axis=0)

    carry = w, jnp.zeros(w.shape, jnp.uint8), of_groups, jnp.zeros(n, jnp.float32)
    w, codes, of_groups, errors = lax.fori_loop(0, (k + padding) // BLOCK, block, carry)
    return InOrder(w[:k], codes[:k], None if of_groups is None else of_groups[:, :k], errors)
