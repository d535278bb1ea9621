"""Weights of a loaded model, changed: with their adapter added, other values, or rows scaled."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jint8._core.qtensor import QTensor, contracted_axes, dequantize
from jint8._core.quantize import quantize
from jint8._core.rounding import SMALLEST_NORMAL


def merged(weight: jax.Array | QTensor, down: jax.Array, up: jax.Array) -> tuple[jax.Array | QTensor, float]:
    """`weight[n, k] + up[n, r] @ down[r, k]`, and how far its rounding is from that: the relative Frobenius norm.

    The sum is in float32. An int8 weight is dequantized, and the sum quantized as the weight was.
    """
    target = _sum(weight, down, up)
    result = requantized(weight, target) if isinstance(weight, QTensor) else target.astype(weight.dtype)
    return result, float(_distance(target, result))


def requantized(weight: QTensor, values: jax.Array) -> QTensor:
    """Other values, quantized as `weight` is: with its config, its outlier columns, and smoothed for its activations.

    Raises:
      ValueError: NaN or infinity in `values`.
    """
    axes, options = contracted_axes(weight), dict[str, Any]()
    if weight.outlier_index is not None:
        options["outliers"] = weight.outlier_index.reshape(-1)
    if weight.smooth is not None:
        # Smoothing divides by sqrt(rms_w / rms_x), from which the activations' rms comes back.
        rms = jnp.sqrt(jnp.mean(jnp.square(dequantize(weight, jnp.float32)), axis=0))
        smooth = weight.smooth.reshape(-1)
        options["rms"] = rms / jnp.maximum(jnp.square(smooth), SMALLEST_NORMAL)
    return quantize(values.astype(weight.dtype), contract_axes=axes, config=weight.config, **options)


@jax.jit
def row_factors(weight: jax.Array | QTensor, down: jax.Array, up: jax.Array, magnitude: jax.Array) -> jax.Array:
    """DoRA's `magnitude / norm(weight + up @ down)` of each row, float32 `[n]`; 1 where the magnitude is 0.

    References:
      Liu et al., DoRA, 2024, arXiv 2402.09353, equation 5.
    """
    norm = jnp.sqrt(jnp.sum(jnp.square(_sum(weight, down, up)), axis=1))
    return jnp.where((magnitude == 0) | (norm == 0), 1, magnitude / norm)


@jax.jit
def scaled_rows(weight: jax.Array | QTensor, factor: jax.Array) -> jax.Array | QTensor:
    """`weight[n, k]` with its rows times `factor[n]`. Of an int8 weight only the scales change: it isn't rounded."""
    if not isinstance(weight, QTensor):
        return (weight.astype(jnp.float32) * factor[:, None]).astype(weight.dtype)
    # Affine values, 16-bit outlier rows and a rotated weight are all in units of the row's scale.
    return dataclasses.replace(weight, scale=weight.scale * factor[:, None])


def placed_alike(new: Any, old: Any) -> Any:
    """A parameter's new values on the devices of the old ones."""
    return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), new, old)


@jax.jit
def _sum(weight: jax.Array | QTensor, down: jax.Array, up: jax.Array) -> jax.Array:
    values = dequantize(weight, jnp.float32) if isinstance(weight, QTensor) else weight.astype(jnp.float32)
    highest = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    return values + highest(up.astype(jnp.float32), down.astype(jnp.float32))


@jax.jit
def _distance(target: jax.Array, result: jax.Array | QTensor) -> jax.Array:
    values = dequantize(result, jnp.float32) if isinstance(result, QTensor) else result.astype(jnp.float32)
    size = jnp.linalg.norm(target)
    return jnp.linalg.norm(values - target) / jnp.where(size == 0, 1, size)
