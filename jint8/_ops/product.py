"""The product of rows and a weight: which path computes it, and its derivative.

Everything that multiplies by an int8 weight ends here (`ragged_dot` apart): `matmul`, `dot_general`, `einsum`, and the
layers of Flax.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jax.typing import DTypeLike

from jint8._core.config import Config, check_config
from jint8._core.platform import gpu_available, on_one_cpu, tpu_in_sight
from jint8._ops import gpu
from jint8._ops.by_platform import Call, by_platform
from jint8._ops.checks import check_precision
from jint8._ops.cpu import native
from jint8._ops.weight import ContractSharding, Weight
from jint8._ops.xla.blocks import fits_blocks
from jint8._ops.xla.one_row import fits_row
from jint8._ops.xla.paths import choose_xla_path, choose_xla_path_on_tpu, traced_product, xla_product
from jint8._ops.xla.plain import column_product, float_product, without_columns

# "dequantize" isn't another path to the same result: it keeps activations in floating point.
Implementation = Literal[
    "xla", "xla_row", "xla_digits", "xla_gather", "xla_blocks", "xla_groups", "dequantize", "native", "triton", "mosaic"
]
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)
# Paths that nobody asks for by name, with XLA in programs for other platforms.
KERNELS_ON_GPU = "kernels_on_gpu"
LIBRARY_ON_CPU = "library_on_cpu"
XLA_BY_PLATFORM = "xla_by_platform"


def choose_path(m: int, w: Weight, config: Config, implementation: str | None) -> str:
    """The path for `m` rows: a name of `IMPLEMENTATIONS` other than `"xla"`, or one of the three above."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"Expected implementation to be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}.")
    if w.packing is not None:
        return _four_bit_path(m, w, config, implementation)
    if implementation in ("xla_blocks", "xla_groups"):
        raise NotImplementedError(f"Expected a weight of four bits for {implementation!r}, got one of int8.")
    if config.table_row.activations is None:
        return "dequantize"
    reason = gpu.unsupported(m, w, config)
    if implementation in gpu.BACKENDS and reason:
        raise NotImplementedError(f"Expected what the GPU kernels can compute, got {reason}.")
    lacks = native.unsupported(w, config)
    if implementation == "native" and lacks:
        raise NotImplementedError(f"Expected what the compiled library can compute, got {lacks}.")
    if implementation == "xla_row" and not fits_row(m, w, config):
        raise NotImplementedError(f"Expected one row and a weight stored [n, k], got {m} rows of {w.k} features.")
    if implementation not in (None, "xla"):
        return implementation
    if implementation is None and _kernels_run(m, w, config):
        return KERNELS_ON_GPU
    if implementation is None and not lacks and native.by_default(m):
        return LIBRARY_ON_CPU
    if implementation is None and isinstance(m, int) and tpu_in_sight():
        return XLA_BY_PLATFORM
    return choose_xla_path(m, w, config)


def _kernels_run(m: int, w: Weight, config: Config) -> bool:
    """Whether the Pallas kernels compute the product in programs for CUDA, where nobody asks for them by name."""
    # They read [n, k]. Transposing other weights at each call would cost more than the kernels gain.
    return w.k_last and gpu_available() and gpu.unsupported(m, w, config) is None


def _xla_path(m: int, w: Weight, config: Config) -> str:
    """The path of XLA's product on the platform that JAX runs on."""
    choose = choose_xla_path_on_tpu if jax.default_backend() == "tpu" else choose_xla_path
    return choose(m, w, config)


def _four_bit_path(m: int, w: Weight, config: Config, implementation: str | None) -> str:
    in_int8 = config.table_row.activations is not None
    if implementation == "xla_blocks" and not fits_blocks(m, w, config):
        raise NotImplementedError(
            f"Expected one row and a weight stored [n, k] in whole blocks, got {m} rows of {w.k} features in groups of "
            f"{w.packing.group if w.packing else None}."
        )
    many_rows = "xla_groups" if in_int8 else "dequantize"
    if implementation in ("xla_blocks", "dequantize", many_rows):
        return implementation
    lacks = native.unsupported_four_bits(m, w, config)
    if implementation == "native" and lacks:
        raise NotImplementedError(f"Expected what the compiled library can compute of four bits, got {lacks}.")
    if implementation == "native":
        return implementation
    if implementation is None and not lacks and native.by_default(m):
        return LIBRARY_ON_CPU
    if implementation in (None, "xla"):
        return "xla_blocks" if on_one_cpu() and fits_blocks(m, w, config) else many_rows
    known = ", ".join(map(repr, sorted({"native", "xla", "xla_blocks", many_rows, "dequantize"})))
    raise NotImplementedError(
        f"Expected {known} for a weight of four bits and the scheme {config.scheme!r}, got {implementation!r}."
    )


def rows_product(
    x: jax.Array,
    w: Weight,
    bias: jax.Array | None = None,
    *,
    config: Config,
    implementation: str | None,
    dtype: DTypeLike,
    precision: Any = None,
    sharding: ContractSharding | None = None,
    note: Callable[[str], None] | None = None,
) -> jax.Array:
    """`x[m, k]` times `w`, plus `bias[n]` -> `dtype[m, n]`, rounded once; differentiable in `x` and `bias`.

    `note` is told which path computes it.
    """
    check_config(config)
    check_precision(precision)
    if w.block:  # there are no outliers in its coordinates but the columns that were taken out before
        config = dataclasses.replace(config, rotate=0, threshold=0.0)
    path = choose_path(x.shape[0], w, config, implementation)
    if note is not None:
        note(_xla_path(x.shape[0], w, config) if path == XLA_BY_PLATFORM else path)
    if 0 in x.shape or 0 in w.q.shape:
        y = jnp.zeros((x.shape[0], w.n), jnp.float32)
        return (y if bias is None else y + bias).astype(dtype)
    product = functools.partial(_product, _Static(config, path, jnp.dtype(dtype), precision, sharding))
    return on_explicit_axes(product, x, w.q, 1 - w.k_axis)(x, w, bias)


def on_explicit_axes(
    product: Callable[..., jax.Array], x: jax.Array, q: jax.Array, channel_axis: int
) -> Callable[..., jax.Array]:
    """`product`, so that it also runs where axes of the mesh are explicit.

    Its parts contract sharded axes, of which explicit axes would want to know at each step how the result is sharded.
    Within, XLA decides. Rows of `x` and output channels of the weights `q` stay where they were.
    """
    if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        return product
    rows, channels = (jax.typeof(a).sharding.spec for a in (x, q))
    return jax.sharding.auto_axes(product, out_sharding=PartitionSpec(rows[0], channels[channel_axis]))


class _Static(NamedTuple):
    """What is static about a product."""

    config: Config
    path: str
    dtype: Any  # of the result
    precision: Any  # of products in floating point
    sharding: ContractSharding | None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _product(static: _Static, x, w: Weight, bias):
    in_float = static.path in ("xla_blocks", "native", LIBRARY_ON_CPU) and static.config.table_row.activations is None
    if in_float or static.path == "dequantize":
        return _compute(static, x, w, bias)
    # Of these weights the calibrated columns are nowhere else.
    apart = w.block or w.packing is not None
    if w.outlier_index is None or not (apart or static.config.uses_calibrated_columns):
        entered, int8 = _entered(static, x, w)
        return _compute(static, entered, int8, bias)
    # The calibrated columns in 16 bits, and the other columns as if those were zeros.
    entered, int8 = _entered(static, without_columns(x, w.outlier_index), w)
    y = _compute(static._replace(dtype=jnp.dtype(jnp.float32)), entered, int8, bias)
    return (y + column_product(x, w, static.precision)).astype(static.dtype)


def _entered(static: _Static, x: jax.Array, w: Weight) -> tuple[jax.Array, Weight]:
    """Activations in the weight's coordinates, and what multiplies those; as they are for kernels that do that, too."""
    if static.path in (*gpu.BACKENDS, KERNELS_ON_GPU):
        return x, w.without_columns()
    return w.coordinates(x), w.int8_alone()


def _compute(static: _Static, x, w: Weight, bias):
    config, path, dtype, precision, sharding = static
    if path in gpu.BACKENDS and not gpu_available():  # in Pallas's interpret mode: slow, for tests
        return gpu.kernel_product(x, w, bias, config, dtype, backend=path, interpret=True)
    if path == XLA_BY_PLATFORM and sharding is not None:
        path = choose_xla_path(x.shape[0], w, config)
    by_library = _by_library if w.packing is None else _four_bits_by_library
    in_library = native.unsupported(w, config) is None and native.by_default(x.shape[0])
    call = Call(
        by_xla=_by_xla,
        by_xla_on_tpu=_by_xla_on_tpu if w.packing is None else None,
        outline=_outline,
        static=(config, dtype, path if path in gpu.BACKENDS else None),
    )
    calls = {
        XLA_BY_PLATFORM: call,
        KERNELS_ON_GPU: call._replace(by_kernels=_by_kernels, by_library=_by_library if in_library else None),
        LIBRARY_ON_CPU: call._replace(by_library=by_library),
        "native": call._replace(by_library=by_library, by_name=True),
        **{name: call._replace(by_kernels=_by_kernels, by_name=True) for name in gpu.BACKENDS},
    }
    if path in calls:
        (y,) = by_platform(calls[path], x, w, bias)
        return y
    return xla_product(x, w, bias, config, path=path, dtype=dtype, precision=precision, sharding=sharding)


def _outline(static, x, w, bias):
    return [jnp.zeros((x.shape[0], w.n), static[1])]


def _by_kernels(static, x, w, bias):
    config, dtype, backend = static
    return [gpu.kernel_product(x, w, bias, config, dtype, backend=backend)]


def _by_library(static, x, w, bias):
    config, dtype, _ = static
    return [native.native_product(w.coordinates(x), w.int8_alone(), bias, config, dtype)]


def _four_bits_by_library(static, x, w, bias):
    return [native.four_bit_product(x, w, bias, static[1])]


def _by_xla(static, x, w, bias):
    config, dtype, _ = static
    if w.packing is None:
        x, w = w.coordinates(x), w.int8_alone()
    path = choose_path(x.shape[0], w, config, "xla")
    return [xla_product(x, w, bias, config, path=path, dtype=dtype)]


def _by_xla_on_tpu(static, x, w, bias):
    config, dtype, _ = static
    x, w = w.coordinates(x), w.int8_alone()
    path = choose_xla_path_on_tpu(x.shape[0], w, config)
    return [traced_product(x, w, bias, config, path=path, dtype=dtype)]


@_product.defjvp
def _product_jvp(static: _Static, primals, tangents):
    """As if the weight were its dequantized value: rounding has no derivative. Weights aren't differentiated."""
    x, w, bias = primals
    x_dot, _, bias_dot = tangents
    y_dot = float_product(x_dot, w, static.precision).astype(jnp.float32)
    if bias is not None:
        y_dot = y_dot + bias_dot.astype(jnp.float32)
    return _product(static, x, w, bias), y_dot.astype(static.dtype)
