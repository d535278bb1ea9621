"""Weights that others stored in int8 with a scale per output channel: read as they are, nothing is rounded again.

A linear layer's `MODULE.weight` is int8 `[n, k]` there, and beside it are its scales:

| tensor | of | what it is |
|---|---|---|
| `MODULE.SCB`, `MODULE.weight_format` | bitsandbytes | 127 times the scales, float32 `[n]`; the order of the values |
| `MODULE.weight_scale` | compressed-tensors, Quark, torchao | the scales, floats `[n, 1]` or `[n]` |
| `MODULE.weight_zero_point` | the same | integers that have to be 0 |
| `MODULE.input_scale`, `MODULE.input_zero_point` | the same | of activations, see `_convert.settings` |

(torchao's own names are others, see `jint8.checkpoints`.) Values may be -128, where ours are at least -127.
"""

from __future__ import annotations

import numpy as np

from jint8._convert import bitsandbytes as bitsandbytes
from jint8._core.rounding import SMALLEST_NORMAL
from jint8.checkpoints import Checkpoint

SCALE = "weight_scale"
OF_ACTIVATIONS = ("input_scale", "input_zero_point")
_BESIDE = ("SCB", "weight_format", SCALE, "weight_zero_point", *OF_ACTIVATIONS)


def is_int8(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has weights in int8."""
    return any(is_int8_weight(checkpoint, name) for name in checkpoint.tensors)


def is_int8_weight(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor is a weight in int8."""
    info = checkpoint.tensors[name]
    if info.dtype != "I8" or len(info.shape) != 2 or not name.endswith("weight"):
        return False
    return any(beside in checkpoint.tensors for beside in scales_of(name))


def scales_of(weight: str) -> tuple[str, str]:
    """The names that the scales of a weight may have: that of bitsandbytes, and that of the others."""
    module = weight.removesuffix("weight")
    return f"{module}SCB", f"{module}{SCALE}"


def companions(checkpoint: Checkpoint, name: str) -> tuple[str, ...]:
    """The tensors beside a weight in int8, of those that are there; none for other tensors."""
    if not is_int8_weight(checkpoint, name):
        return ()
    module = name.removesuffix("weight")
    return tuple(f"{module}{beside}" for beside in _BESIDE if f"{module}{beside}" in checkpoint.tensors)


def read_weight(checkpoint: Checkpoint, weight: str, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    """int8 `[n, k]` and the float32 scales `[n, 1]` of some rows of a weight.

    A row of zeros gets the scale 0, as everywhere in jint8, whatever its scale is in the file.

    Raises:
      ValueError: scales of a wrong shape or dtype, not finite or negative, 0 or subnormal for a row that isn't 0; zero
        points; or values of bitsandbytes in another order than rows.
    """
    n = checkpoint.tensors[weight].shape[0]
    of_bitsandbytes, name = scales_of(weight)
    if of_bitsandbytes in checkpoint.tensors:
        name = of_bitsandbytes
        scale = bitsandbytes.read_scales(checkpoint, weight.removesuffix("weight"), n)
    else:
        scale = _read_scales(checkpoint, name, n)
        _check_zero_points(checkpoint, weight)
    scale = scale[rows, None]
    if not np.all(np.isfinite(scale)):
        raise ValueError(f"Expected finite scales in {name}, got NaN or infinity.")
    if (scale < 0).any():
        raise ValueError(f"Expected scales of at least 0 in {name}, got {scale.min()}.")
    q = checkpoint.read_rows(weight, rows.start, rows.stop)
    used = q.any(axis=1, keepdims=True)
    if (used & (scale < SMALLEST_NORMAL)).any():
        raise ValueError(f"Expected a scale above 0 in {name} for each row that has other values than 0, got 0.")
    return q, np.where(used, scale, np.float32(0))


def _read_scales(checkpoint: Checkpoint, name: str, n: int) -> np.ndarray:
    """Scales that are stored as such, float32 `[n]`, to which bfloat16 and float16 widen exactly."""
    info = checkpoint.tensors[name]
    if info.dtype not in ("F32", "F16", "BF16") or info.shape not in ((n,), (n, 1)):
        raise ValueError(f"Expected {name} as F32, F16 or BF16 ({n}, 1), got {info.dtype} {info.shape}.")
    return checkpoint.read(name).astype(np.float32).reshape(n)


def _check_zero_points(checkpoint: Checkpoint, weight: str) -> None:
    name = f"{weight}_zero_point"
    if name in checkpoint.tensors and checkpoint.read(name).tobytes().strip(b"\0"):
        raise ValueError(f"Expected zero points of 0 in {name}, as symmetric weights have, got others.")
