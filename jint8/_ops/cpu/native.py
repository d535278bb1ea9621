"""`"native"`: the product of rows and an int8 weight by the compiled library of this package."""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jint8._core.config import Config
from jint8._ops.activations import LARGEST_FLOAT, affine_activations
from jint8._ops.cpu.compile import LIBRARY
from jint8._ops.weight import MAX_K, Weight

TARGET = "jint8_product"
ATTENTION_TARGET = "jint8_decode_attention"
GATED_TARGET = "jint8_gated_network"
LAYER_TARGET = "jint8_decode_layer"
FOUR_BITS_TARGET = "jint8_four_bit_product"
HANDLERS = {
    TARGET: "Jint8Product",
    ATTENTION_TARGET: "Jint8DecodeAttention",
    GATED_TARGET: "Jint8GatedNetwork",
    LAYER_TARGET: "Jint8DecodeLayer",
    FOUR_BITS_TARGET: "Jint8FourBitProduct",
}
CODES_AT_ONCE, MOST_GROUPS = 64, 2048  # of weights of four bits, in the library
FEW_ROWS = 16
MATRIX_KERNELS = "amx-int8"
MAX_K_AFFINE = 65_000  # products of up to 255 * 128 sum up in int32, over so many features


@functools.cache
def kernels() -> str | None:
    """Which kernels the library has for this processor, such as `"avx2"`; None where there is no library.

    Registers the library with XLA when called for the first time. `JINT8_NATIVE=0` in the environment leaves it out;
    `JINT8_CPU_KERNELS` names other kernels than the best. Where JAX is of a version for which the library wasn't
    compiled, there is a warning, and no library.

    Raises:
      ValueError: `JINT8_CPU_KERNELS` names kernels that this processor or the library hasn't.
    """
    path = Path(__file__).parent / LIBRARY
    if os.environ.get("JINT8_NATIVE") == "0" or not path.exists():
        return None
    try:
        library = ctypes.cdll.LoadLibrary(str(path))
    except OSError:  # compiled for another system, in a directory that several share
        return None
    library.jint8_cpu_kernels.restype = ctypes.c_char_p
    name = library.jint8_cpu_kernels().decode()
    if not name:
        asked = os.environ["JINT8_CPU_KERNELS"]
        raise ValueError(f"Expected JINT8_CPU_KERNELS to name kernels that this processor can run, got {asked!r}.")
    return name if _register(library) else None


def _register(library: ctypes.CDLL) -> bool:
    """Whether XLA takes the library's handlers."""
    try:
        # Before it has started, JAX would only note them, and then fail to start at all because of one it can't take.
        jax.local_devices(backend="cpu")
    except RuntimeError:  # JAX runs without CPUs
        return False
    try:
        for target, handler in HANDLERS.items():
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, handler)), platform="cpu")
    except (jax.errors.JaxRuntimeError, AttributeError) as error:  # an AttributeError where it is older than this file
        warnings.warn(
            "Products on CPUs run in XLA, because the compiled library doesn't fit this version of JAX or jint8; "
            f"installing jint8 again compiles it anew. ({str(error).splitlines()[0]})",
            stacklevel=2,
        )
        return False
    return True


def by_default(m: int) -> bool:
    """Whether products of `m` rows on CPUs run in the library where nobody says.

    Up to `FEW_ROWS`, and more on processors with matrix instructions, it takes less time than XLA everywhere that was
    measured (benchmarks/bench_native.py). `JINT8_NATIVE` in the environment decides otherwise: with `1` for any number
    of rows, with `named` for none: then only `implementation="native"` runs in it.
    """
    asked = os.environ.get("JINT8_NATIVE")
    if asked in ("1", "named"):
        return asked == "1"
    return isinstance(m, int) and (m <= FEW_ROWS or kernels() == MATRIX_KERNELS)


def unsupported(w: Weight, config: Config) -> str | None:
    """Why the library can't compute a product of `w`; None if it can."""
    if kernels() is None:
        return "no compiled library: it is made when jint8 is installed on a machine with a C++ compiler"
    if w.packing is not None:
        return "weights of four bits"
    if not w.k_last:
        return "a weight stored [k, n]"
    if config.table_row.activations != "token":
        return f"scheme {config.scheme!r}, whose activations haven't a scale per token"
    if config.decomposes and config.relative:
        return "a threshold relative to the token"
    if config.digits != 1:
        return f"{config.digits} digits per activation"
    if w.k > (limit := MAX_K_AFFINE if affine_activations(config) else MAX_K):
        return f"k = {w.k}, where sums of more than {limit} products exceed int32"
    return None


def unsupported_four_bits(m: Any, w: Weight, config: Config) -> str | None:
    """Why the library can't compute a product of `m` rows and `w`, which is of four bits; None if it can."""
    assert w.packing is not None
    if kernels() is None:
        return "no compiled library: it is made when jint8 is installed on a machine with a C++ compiler"
    if config.table_row.activations is not None:
        return f"scheme {config.scheme!r}, whose activations aren't floats"
    if not w.k_last or w.packing.features != w.k:
        return "a weight whose features aren't its last axis"
    if w.packing.channels is not None:
        return "groups of output channels"
    if w.packing.group % CODES_AT_ONCE:
        return f"groups of {w.packing.group} features, not of a multiple of {CODES_AT_ONCE}"
    if w.k > MOST_GROUPS * w.packing.group:
        return f"more than {MOST_GROUPS} groups"
    if not isinstance(m, int) or m > FEW_ROWS:
        return f"{m} rows, more than {FEW_ROWS}"
    return None


def four_bit_product(x: jax.Array, w: Weight, bias: jax.Array | None, dtype: DTypeLike) -> jax.Array:
    """`x[m, k]` times `w` of four bits, plus `bias[n]` -> `dtype[m, n]`, in one call of the library.

    Smoothing and rotation of `x`, and calibrated columns in 16 bits, are in it, too. A row is rounded to integers of 16
    bits within each group of features.
    """
    assert w.packing is not None
    assert w.group_scale is not None
    assert w.group_min is not None
    nothing = jnp.zeros(0, jnp.float32)
    columns = w.outlier_index is not None and w.outlier_rows is not None
    out = jax.ShapeDtypeStruct((x.shape[0], w.n), jnp.dtype(dtype))
    return jax.ffi.ffi_call(FOUR_BITS_TARGET, out, vmap_method="sequential")(
        x,
        w.q,
        jnp.broadcast_to(w.scale, (w.n,)),
        w.group_scale,
        w.group_min,
        w.outlier_index if columns else jnp.zeros(0, jnp.int32),
        w.outlier_rows if columns else jnp.zeros((w.n, 0), jnp.float16),
        nothing if w.smooth is None else w.smooth,
        nothing if bias is None else bias.astype(jnp.float32),
        group=np.int64(w.packing.group),
        block=np.int64(0 if w.smooth is None else w.block),
    )


def native_product(x: jax.Array, w: Weight, bias: jax.Array | None, config: Config, dtype: DTypeLike) -> jax.Array:
    """`x[m, k]` times `w[n, k]`, plus `bias[n]` -> `dtype[m, n]`, in one call of the library.

    The integers are those of the XLA paths. Outliers are multiplied in float32, in the order of their columns, so a
    row's result doesn't depend on the rows beside it unless the config says so.
    """
    out = jax.ShapeDtypeStruct((x.shape[0], w.n), jnp.dtype(dtype))
    # A vmap adds a batch dimension, of size 1 to what it doesn't map over: the library goes through them itself.
    return jax.ffi.ffi_call(TARGET, out, vmap_method="expand_dims")(
        x,
        w.q,
        *scale_and_zero(w),
        jnp.zeros(0, jnp.float32) if bias is None else bias.astype(jnp.float32),
        **options(config),
    )


def scale_and_zero(w: Weight) -> tuple[jax.Array, jax.Array]:
    """Scales `[n]` of the output channels, and their zero points, of which an empty array means that all are 0."""
    zero = jnp.zeros(0, jnp.float32) if w.zero is None else jnp.broadcast_to(w.zero, (w.n,))
    return jnp.broadcast_to(w.scale, (w.n,)), zero


def options(config: Config) -> dict[str, Any]:
    """How a product decomposes and rounds, as the library's handlers take it."""
    return {
        "threshold": np.float32(min(config.threshold, LARGEST_FLOAT) if config.decomposes else 0.0),
        "by_column": config.outliers == "batch",
        "affine": affine_activations(config),
    }
