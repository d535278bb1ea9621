"""Blocks of four bits taken apart: codes, and a step and a minimum for each group of 32 values.

Layouts are ggml's (`ggml-common.h`, `ggml-quants.c` in https://github.com/ggml-org/ggml). Bytes hold, in their low and
high halves, two values that are 16 (Q4_0, Q4_1) or 32 (Q4_K) apart.

| type | bytes of a block | value |
|---|---|---|
| Q4_0 | float16 d, 16 of codes | d (code - 8) |
| Q4_1 | float16 d, float16 m, 16 of codes | d code + m |
| Q4_K | float16 d, float16 m, 12 of eight 6-bit scales and minima, 128 of codes | d scale code - m minimum |
"""

from __future__ import annotations

import numpy as np

from jint8.checkpoints._checkpoint import Groups

GROUP = 32
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q4_K": 144}


def groups_of(raw: np.ndarray, kind: str) -> Groups:
    """The codes of rows of blocks, `raw` uint8 `[n, bytes]` of the type `kind`."""
    blocks = raw.reshape(len(raw), -1, BLOCK_BYTES[kind])
    step, low, codes = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q4_K": _q4_k}[kind](blocks)
    return Groups(*(array.reshape(len(raw), -1) for array in (codes, step, low)))


def _q4_0(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    step = _float16(blocks, 0)
    return step, -8 * step, _halves(blocks[..., 2:])


def _q4_1(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return _float16(blocks, 0), _float16(blocks, 2), _halves(blocks[..., 4:])


def _q4_k(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    packed = blocks[..., 4:16]
    # Of the first four groups, scales and minima are the low six bits of a byte each. The others have their low four
    # bits in a byte together, and the two high ones in the bytes of the first four.
    first, of_low, both = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scale = np.concatenate([first & 63, (both & 15) | (first >> 6 << 4)], axis=-1)
    minimum = np.concatenate([of_low & 63, (both >> 4) | (of_low >> 6 << 4)], axis=-1)
    step, low = _float16(blocks, 0) * scale, -_float16(blocks, 2) * minimum
    return step, low, _halves(blocks[..., 16:].reshape(*blocks.shape[:-1], 4, GROUP))


def _float16(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at a byte of each block, float32 `[..., 1]`."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16).astype(np.float32)


def _halves(q: np.ndarray) -> np.ndarray:
    """The codes of bytes `[..., m]`, `[..., 2m]`: the low halves of all, then the high ones."""
    return np.concatenate([q & 15, q >> 4], axis=-1)
