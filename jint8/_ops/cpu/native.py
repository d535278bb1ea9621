"""`"native"`: the product of rows and an int8 weight by the compiled library of this package."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jint8._core.config import Config
from jint8._ops.activations import LARGEST_FLOAT, affine_activations
from jint8._ops.cpu.compile import LIBRARY
from jint8._ops.weight import MAX_K, Weight

TARGET = "jint8_product"
MAX_K_AFFINE = 65_000  # products of up to 255 * 128 sum up in int32, over so many features


@functools.cache
def kernels() -> str | None:
    """Which kernels the library has for this processor, such as `"avx2"`; None where there is no library.

    Registers the library with XLA when called for the first time. `JINT8_NATIVE=0` in the environment leaves it out;
    `JINT8_CPU_KERNELS` names other kernels than the best.

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
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library.Jint8Product), platform="cpu")
    return name


def by_default() -> bool:
    """Whether products on CPUs run in the library where nobody says: `JINT8_NATIVE=1` in the environment."""
    return os.environ.get("JINT8_NATIVE") == "1"


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


def native_product(x: jax.Array, w: Weight, bias: jax.Array | None, config: Config, dtype: DTypeLike) -> jax.Array:
    """`x[m, k]` times `w[n, k]`, plus `bias[n]` -> `dtype[m, n]`, in one call of the library.

    The integers are those of the XLA paths. Outliers are multiplied in float32, in the order of their columns, so a
    row's result doesn't depend on the rows beside it unless the config says so.
    """
    nothing = jnp.zeros(0, jnp.float32)
    out = jax.ShapeDtypeStruct((x.shape[0], w.n), jnp.dtype(dtype))
    # A vmap adds a batch dimension, of size 1 to what it doesn't map over: the library goes through them itself.
    return jax.ffi.ffi_call(TARGET, out, vmap_method="expand_dims")(
        x,
        w.q,
        jnp.broadcast_to(w.scale, (w.n,)),
        nothing if w.zero is None else jnp.broadcast_to(w.zero, (w.n,)),
        nothing if bias is None else bias.astype(jnp.float32),
        threshold=np.float32(min(config.threshold, LARGEST_FLOAT) if config.decomposes else 0.0),
        by_column=config.outliers == "batch",
        affine=affine_activations(config),
    )
