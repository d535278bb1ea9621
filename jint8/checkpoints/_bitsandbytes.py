"""Weights that bitsandbytes stored in four bits (NF4, FP4): read as float32.

A linear layer's `MODULE.weight` is bytes there, two values in each, the first in the high half; all values of `[n, k]`
are in one line, in blocks with a largest magnitude each. Beside it are:

| tensor | what it is |
|---|---|
| `MODULE.weight.quant_state.bitsandbytes__nf4` (or `__fp4`) | JSON: the shape, the size of blocks, and so on |
| `MODULE.weight.absmax` | of each block, float32; with nested quantization uint8 |
| `MODULE.weight.quant_map` | what the sixteen codes stand for, float32 |
| `MODULE.weight.nested_absmax`, `nested_quant_map` | the same of `absmax`, 256 codes; an offset is in the JSON |

A value is `quant_map[code] absmax[block]`, with
`absmax[b] = nested_quant_map[code] nested_absmax[b // nested_blocksize] + nested_offset` where that is nested.
Source: Dettmers et al., QLoRA, 2023, arXiv 2305.14314, section 3.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jint8.checkpoints._checkpoint import TensorInfo
from jint8.checkpoints._json import parse_json

KINDS = ("NF4", "FP4")  # what `TensorInfo.dtype` is of such a weight
_STATE = ".quant_state.bitsandbytes__"
_BESIDE = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_FIELDS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED = {"nested_blocksize", "nested_dtype", "nested_offset"}

Read = Callable[[str], np.ndarray]  # the values of a tensor by its name


@dataclasses.dataclass(frozen=True)
class Packed:
    """A weight of four bits in the file.

    Attributes:
      info: of the tensor of bytes, by its name in the file.
      block: how many values share a largest magnitude.
      nested: None, or how many of these share one themselves, and what is added to them.
    """

    info: TensorInfo
    block: int
    nested: tuple[int, float] | None


def find_packed(tensors: Mapping[str, TensorInfo], read: Read) -> tuple[dict[str, TensorInfo], dict[str, Packed]]:
    """Tensors with weights of four bits as what they stand for, and how these are stored, by name.

    Raises:
      ValueError: what stands beside such a weight is missing or isn't that of one; the message names it.
    """
    states = {name: name.split(_STATE) for name in tensors if _STATE in name}
    packed: dict[str, Packed] = {}
    found = dict(tensors)
    for state, (weight, kind) in states.items():
        try:
            if weight not in tensors or kind.upper() not in KINDS or weight in packed:
                raise ValueError("Expected it beside one weight in nf4 or fp4, got another tensor")
            beside = {name: tensors[f"{weight}.{name}"] for name in _BESIDE if f"{weight}.{name}" in tensors}
            shape, packed[weight] = _packed(tensors[weight], kind, read(state).tobytes(), beside)
        except ValueError as error:
            raise ValueError(f"{tensors[state].file}: tensor {state!r}: {error}") from None
        found[weight] = dataclasses.replace(tensors[weight], shape=shape, dtype=kind.upper())
        for name in (state, *(f"{weight}.{name}" for name in beside)):
            del found[name]
    return found, packed


def _packed(
    info: TensorInfo, kind: str, raw: bytes, beside: Mapping[str, TensorInfo]
) -> tuple[tuple[int, int], Packed]:
    """The shape of a weight, and how it is stored."""
    state = parse_json(raw, info.file)
    nested = any(name in state for name in _NESTED)
    expected = _FIELDS | _NESTED if nested else _FIELDS
    if state.keys() != expected or state["quant_type"] != kind:
        raise ValueError(f"Expected the fields {', '.join(sorted(expected))} with quant_type {kind!r}, got {state}")
    names = _BESIDE if nested else _BESIDE[:2]
    if tuple(beside) != names:
        raise ValueError(f"Expected beside it {', '.join(names)}, got {', '.join(beside) or 'nothing'}")
    shape, block = state["shape"], _positive(state, "blocksize")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
        raise ValueError(f"Expected a shape [n, k], got {shape!r}")
    n, k = shape
    if info.nbytes != (n * k + 1) // 2:
        raise ValueError(f"Expected {(n * k + 1) // 2} bytes for the shape {shape}, got {info.nbytes}")
    blocks = math.ceil(n * k / block)
    of_blocks = None
    if nested:
        size, offset = _positive(state, "nested_blocksize"), state["nested_offset"]
        if not isinstance(offset, (int, float)) or not math.isfinite(offset):
            raise ValueError(f"Expected a number as nested_offset, got {offset!r}")
        of_blocks = size, float(offset)
        sizes = {"absmax": ("U8", blocks), "nested_absmax": ("F32", math.ceil(blocks / size))}
        sizes |= {"nested_quant_map": ("F32", 256)}
    else:
        sizes = {"absmax": ("F32", blocks)}
    for name, (dtype, size) in (sizes | {"quant_map": ("F32", 16)}).items():
        if (got := beside[name]).dtype != dtype or got.shape != (size,):
            raise ValueError(f"Expected {name} as {dtype} ({size},), got {got.dtype} {got.shape}")
    return (n, k), Packed(info, block, of_blocks)


def _positive(state: Mapping[str, Any], name: str) -> int:
    value = state[name]
    if type(value) is not int or value < 1:
        raise ValueError(f"Expected a positive {name}, got {value!r}")
    return value


def dequantized(packed: Packed, raw: np.ndarray, start: int, count: int, read: Read) -> np.ndarray:
    """Values `start:start + count` of a weight, all in one line, float32.

    Args:
      packed: how it is stored.
      raw: the bytes that have these values, uint8.
      start: the first value.
      count: how many.
      read: for the tensors beside the weight.
    """
    codes = np.stack([raw >> 4, raw & 15], axis=1).reshape(-1)[start % 2 :][:count]
    weight, block = packed.info.name, packed.block
    first, last = start // block, -(-(start + count) // block)
    largest = read(f"{weight}.absmax")[first:last]
    if packed.nested is not None:
        size, offset = packed.nested
        of_blocks = read(f"{weight}.nested_absmax")[np.arange(first, last) // size]
        largest = read(f"{weight}.nested_quant_map")[largest] * of_blocks + np.float32(offset)
    return read(f"{weight}.quant_map")[codes] * np.repeat(largest, block)[start - first * block :][:count]
