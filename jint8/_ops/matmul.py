"""`jint8.matmul`: it checks its arguments, and `product` decides which path computes."""

from __future__ import annotations

import math

import jax
from jax.sharding import Mesh

from jint8._core.config import Config
from jint8._core.qtensor import QTensor, config_for, contracted_axes, is_qtensor
from jint8._core.storage import stored_shape
from jint8._ops.checks import check_activations, check_bias
from jint8._ops.compare import Compared, float_rows, hold, note_of
from jint8._ops.observe import Observed, watch
from jint8._ops.product import Implementation, rows_product
from jint8._ops.weight import ContractSharding, Weight, packing_of


def matmul(
    x: jax.Array,
    w: QTensor,
    *,
    bias: jax.Array | None = None,
    config: Config | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """The LLM.int8() product of activations and an int8 weight.

    Formula, with `O` the outlier columns of `x`, `sx` the absmax of a row over the other columns / 127, and `xq` their
    int8 values: `y = sw * (sx * sum_{h not in O} xq[h] q[h] + sum_{h in O} x[h] q[h]) + bias`. The first sum is exact
    in int32; the outliers of the second carry 16 bits relative to their row's largest; one rounding, at the end.

    Exact for any number of outliers, under `jit`, `vmap`, `scan` and `grad`, without host synchronisation and without
    recompiling when their number changes. Differentiable in `x` and `bias`, as if `w` were its dequantized value.

    Args:
      x: bfloat16, float16 or float32 `[..., k]`; any number of leading dimensions, also none or empty ones.
      w: a two-dimensional `QTensor` of which one axis, of size k, is contracted.
      bias: None or float `[n]`.
      config: None means the one stored in `w`. Of a weight that was rotated, one that rotates, too.
      implementation: None picks by static shapes and platform: the Pallas kernels on CUDA, on CPUs the compiled library
        where it is there and faster than XLA, and XLA elsewhere. `"xla"` picks
        among the XLA paths: `"xla_row"` (one row, on a CPU: sums of products unless there are outliers), `"xla_digits"`
        (few rows: outliers as extra rows of one int8 product) and `"xla_gather"` (many rows: gathered outlier columns).
        `"native"` is the compiled library's, on CPUs (`JINT8_NATIVE=1` in the environment takes it for all products
        that it can compute, `named` only where asked for like this, and `0` leaves it out). `"triton"` and `"mosaic"`
        (Hopper) name a backend of the kernels; off the GPU they are interpreted, which is for tests. `"dequantize"` is
        another result: activations stay in floating point, as they do beside a weight of four bits by the scheme
        `"int4"`. Of four bits, `"xla_blocks"` is the product of one row, block by block as it is packed, and
        `"xla_groups"`, by `"int4-a8"`, that of any number, with exact sums of each group.

    Returns:
      `[..., n]` in `x.dtype`. A row of `x` with NaN or infinity comes out non-finite.

    Raises:
      TypeError: `x` or `bias` isn't of a supported float dtype, or `w` isn't a `QTensor`.
      ValueError: shapes that don't fit, or an unknown implementation.
      NotImplementedError: `"native"`, `"triton"`, `"mosaic"`, `"xla_row"` or `"xla_blocks"` for a scheme or a size that
        they don't compute, or any of int8 for a weight of four bits.

    Examples:
      >>> import jax.numpy as jnp, jint8
      >>> w = jint8.quantize(jnp.eye(4))
      >>> jint8.matmul(jnp.array([1.0, 0.0, 0.0, 9.0]), w).tolist()
      [1.0, 0.0, 0.0, 9.0]

    References:
      arXiv 2208.07339, section 3.2 and equation 8.
    """
    return _matmul(x, w, bias, config, implementation)


def sharded_matmul(x: jax.Array, w: QTensor, *, bias: jax.Array | None = None, mesh: Mesh, axis: str) -> jax.Array:
    """`matmul` of arrays whose contracted features are sharded over `axis` of `mesh`.

    The same integers as on one device (but of outliers of many rows beyond `MAX_GATHERED_K` features, whose digits are
    narrower). What the devices exchange are the largest values of each row, and the sums.

    Args:
      x: as in `matmul`.
      w: as in `matmul`.
      bias: as in `matmul`; replicated.
      mesh: of devices.
      axis: of the mesh, whose size divides k; where it doesn't, XLA decides what to exchange.

    Returns:
      `[..., n]` in `x.dtype`, replicated.
    """
    sharding = ContractSharding(mesh, axis) if x.shape[-1] % mesh.shape[axis] == 0 else None
    return _matmul(x, w, bias, None, "xla", sharding)


def matrix_of(w: QTensor) -> Weight:
    """A two-dimensional weight's arrays, as products take them."""
    axis = contracted_axes(w)[-1] if 1 in w.scale.shape else 0
    return Weight(
        q=w.q,
        scale=w.scale.reshape(-1),
        zero=None if w.zero is None else w.zero.reshape(-1),
        outlier_rows=w.outlier_rows,
        outlier_index=None if w.outlier_index is None else w.outlier_index.reshape(-1),
        smooth=None if w.smooth is None else w.smooth.reshape(-1),
        group_scale=w.group_scale,
        group_min=w.group_min,
        k_last=axis == 1,
        block=w.config.rotate,
        packing=packing_of(w, free_axes=[1 - axis]),
    )


def _matmul(
    x: jax.Array,
    w: QTensor,
    bias: jax.Array | None,
    config: Config | None,
    implementation: Implementation | None,
    sharding: ContractSharding | None = None,
) -> jax.Array:
    check_activations(x)
    if not is_qtensor(w):
        raise TypeError(f"Expected w to be a QTensor, got {type(w).__name__}.")
    if w.q.ndim != 2:
        raise ValueError(f"Expected w to have 2 dimensions, got shape {w.q.shape}; see jint8.dot_general.")
    axis = contracted_axes(w)[-1] if 1 in w.scale.shape else 0
    k, n = stored_shape(w)[axis], w.q.shape[1 - axis]
    if w.scale.shape[axis] != 1 or w.scale.shape[1 - axis] != n:
        raise ValueError(f"Expected w to be quantized over one axis, got scales {w.scale.shape} for {w.q.shape}.")
    if x.shape[-1:] != (k,):
        raise ValueError(f"Expected x of shape (..., {k}) for a weight of shape {w.shape}, got {x.shape}.")
    if bias is not None:
        check_bias(bias, (n,))
    rows = x.reshape(math.prod(x.shape[:-1]), k)
    if isinstance(w, Observed) and not isinstance(w, Compared):
        rows = watch(w.counted, rows, w.tap.reshape(-1))
    y = rows_product(
        rows,
        matrix_of(w),
        bias,
        config=config_for(w, config),
        implementation=implementation,
        dtype=x.dtype,
        sharding=sharding,
        note=note_of(w),
    )
    if isinstance(w, Compared):
        y = hold(y, float_rows(rows, w.beside, axis == 1), bias, w.tap.reshape(-1))
    return y.reshape(*x.shape[:-1], n)
