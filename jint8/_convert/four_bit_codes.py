"""Weights that a checkpoint has in four bits.

GGUF's Q4_0, Q4_1 and Q4_K have codes from 0 to 15 in groups along the features, as `QTensor` has them with
`grouping="oc"`: they are kept as they are, bit for bit, where the config can. Other groups, or features that a rotation
mixes, need other codes. Those of bitsandbytes (NF4, FP4) have no equal steps; they are dequantized and rounded again.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jint8._convert.quantize_rows import check_finite
from jint8._core.config import Config
from jint8._core.four_bits import pack, quantize_groups
from jint8._trees.left_out import first_frame_outside
from jint8.checkpoints import Checkpoint

# Quotients of float16 by this are exact: their block's step and minimum are the file's own.
_EXACT = ("Q4_0", "Q4_1")


def is_packed(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor is a weight of bitsandbytes in four bits: `[n, k]` also where the family's are `[k, n]`."""
    return checkpoint.tensors[name].dtype in ("NF4", "FP4")


def keeps_codes(config: Config) -> bool:
    """Whether weights are quantized by a config that codes of a file can belong to."""
    return config.four_bits and not config.rotate and config.grouping != "ic" and config.rounding == "nearest"


def kept_group(checkpoint: Checkpoint, names: Sequence[str], config: Config) -> int | None:
    """The size of the groups of a parameter made of these tensors, of which at least one keeps its codes; or None."""
    if not keeps_codes(config):
        return None
    return next((group for name in names if (group := checkpoint.group(name)) is not None), None)


def say_rounded(checkpoint: Checkpoint, targets: Mapping[str, Any], config: Config) -> None:
    """Warns of weights in four bits that are rounded again: bitsandbytes' always, others to four bits."""
    names = [name for target in targets.values() if target.contract_axes is not None for name in target.source.tensors]
    if count := sum(is_packed(checkpoint, name) for name in names):
        warnings.warn(
            f"{checkpoint.path}: {count} weights that bitsandbytes has in four bits are dequantized and rounded a "
            f"second time (scheme={config.scheme!r}); quantize=False doesn't round them.",
            stacklevel=first_frame_outside(),
        )
    if not config.four_bits or keeps_codes(config):
        return
    count = sum(checkpoint.group(name) is not None for name in names)
    if count:
        why = f"rotate={config.rotate}" if config.rotate else f"grouping={config.grouping!r}"
        why = why if config.rounding == "nearest" else f"rounding={config.rounding!r}"
        warnings.warn(
            f"{checkpoint.path}: {count} weights that the file has in four bits are rounded to four bits a second time "
            f"({why}). Config(scheme='int4') keeps their codes.",
            stacklevel=first_frame_outside(),
        )


def read_rows(checkpoint: Checkpoint, name: str, rows: slice, group: int, floats: Any) -> dict[str, np.ndarray]:
    """Rows of a tensor as those of a `QTensor`'s arrays, in groups of `group` features.

    Args:
      checkpoint: that has the tensor.
      name: of the tensor. One that isn't in four bits is rounded.
      rows: which.
      group: the size of the groups.
      floats: its values in these rows, float `[n, k]`.

    Returns:
      `q`, `scale`, `group_scale` and `group_min` by name.

    Raises:
      ValueError: NaN or infinity.
    """
    check_finite(floats)
    if checkpoint.group(name) is None:
        codes, scale, step, low = map(np.asarray, _rounded(jnp.asarray(floats, jnp.float32), group))
    else:
        codes, of_codes, of_low = checkpoint.read_groups(name, rows.start, rows.stop)
        scale = np.ones((len(codes), 1), np.float32)
        if checkpoint.tensors[name].dtype not in _EXACT:
            # The power of two below each row's largest, so that few steps are too small for all bits of a float16.
            largest = np.maximum(np.abs(of_codes), np.abs(of_low)).max(axis=1, keepdims=True, initial=0)
            scale = np.ldexp(np.float32(1), np.frexp(largest)[1] - 1).astype(np.float32)
        with np.errstate(over="ignore"):
            step, low = ((array / scale).astype(np.float16) for array in (of_codes, of_low))
        check_finite(low)
    return {"q": np.asarray(_packed(codes, group)), "scale": scale, "group_scale": step, "group_min": low}


@functools.partial(jax.jit, static_argnames="group")
def _packed(codes: jax.Array, group: int) -> jax.Array:
    return pack(codes, 1, group)


@functools.partial(jax.jit, static_argnames="group")
def _rounded(values: jax.Array, group: int) -> tuple[jax.Array, ...]:
    return quantize_groups(values, (1,), 1, group)
