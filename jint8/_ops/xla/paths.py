"""Which path computes a product in XLA, and the product itself. Start reading here."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jint8._core.config import Config
from jint8._core.platform import on_one_cpu
from jint8._ops.weight import ContractSharding, Weight
from jint8._ops.xla.blocks import int8_block_product
from jint8._ops.xla.decomposed import FEW_ROWS, int8_product
from jint8._ops.xla.groups import group_product
from jint8._ops.xla.one_row import fits_row, row_by_row
from jint8._ops.xla.plain import float_product
from jint8._ops.xla.selected import FEW_ROWS_ON_TPU, selected_product, selects


def choose_xla_path(m: int, w: Weight, config: Config) -> str:
    """The path for `m` rows; a number that isn't known (symbolic shapes, in an exported program) may be large."""
    if not isinstance(m, int):
        return "xla_gather"
    # Not on a GPU: its condition on the data would make the device wait for the host.
    if on_one_cpu() and fits_row(m, w, config):
        return "xla_row"
    return "xla_digits" if m <= FEW_ROWS else "xla_gather"


def choose_xla_path_on_tpu(m: int, w: Weight, config: Config) -> str:
    """The path for `m` rows in a program for a TPU, where loops over blocks of columns cost more than products."""
    if not isinstance(m, int) or not selects(w, config):
        return "xla_gather"
    return "xla_digits" if m <= FEW_ROWS_ON_TPU else "xla_selected"


# Jitted, because outside of a jit the loop over gathered columns would be compiled anew at each call.
@functools.partial(jax.jit, static_argnames=("config", "path", "dtype", "precision", "sharding"))
def xla_product(x, w, bias, config, *, path, dtype, precision=None, sharding=None) -> jax.Array:
    """`traced_product`, as a function that XLA compiles."""
    return traced_product(x, w, bias, config, path=path, dtype=dtype, precision=precision, sharding=sharding)


def traced_product(
    x: jax.Array,
    w: Weight,
    bias: jax.Array | None,
    config: Config,
    *,
    path: str,
    dtype: DTypeLike,
    precision: Any = None,
    sharding: ContractSharding | None = None,
) -> jax.Array:
    """`x[m, k]` times a quantized weight, plus `bias[n]`, in float32 -> `dtype[m, n]`."""
    # x is used several times: without a barrier XLA fuses what produces it into each use, and computes it again there.
    x = lax.optimization_barrier(x)
    if w.packing is not None:
        # A loop around this would unpack the weight once, before it, to many times its memory.
        x, q = lax.optimization_barrier((x, w.q))
        # Blocks, and code that isn't XLA's, read the bytes as they are.
        unpacks = path in ("dequantize", "xla_groups")
        w = dataclasses.replace(w, q=q ^ _zero_of(x).astype(q.dtype) if unpacks else q)
    if path == "xla_selected":
        return selected_product(x, w, bias, config, dtype)
    if path == "xla_groups":
        y = group_product(x, w, config)
    elif path == "xla_blocks" and config.table_row.activations is not None:
        y = int8_block_product(x, w, config)
    elif path in ("dequantize", "xla_blocks"):
        y = float_product(x.astype(jnp.float32), w, precision, by_blocks=path == "xla_blocks")
    elif path == "xla_row":
        y = row_by_row(config)(x, w)
    else:
        y = int8_product(x, w, config, path=path, sharding=sharding)
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(dtype)


def _zero_of(x: jax.Array) -> jax.Array:
    """int32 0 that depends on `x[m, k]`, which XLA can't know.

    On the CPU XLA drops barriers early. What depends on weights alone it then computes for all layers at the start of a
    program, or before a loop, and holds all of it: the unpacked weights of a whole model.
    """
    magnitude = jnp.abs(x[0, 0].astype(jnp.float32))
    return jnp.minimum(lax.bitcast_convert_type(magnitude, jnp.int32), 0)
