"""Tensors as checkpoints have them, and as the decoder has them: `[n, k]`, queries above keys above values."""

from __future__ import annotations

import math

import numpy as np

from jint8.models._config import ModelConfig
from jint8.models.families._family import COLUMNS, HEADS


def from_stored(value: np.ndarray, layout: str, config: ModelConfig) -> np.ndarray:
    """A tensor of a checkpoint in the decoder's order."""
    if layout == COLUMNS and value.ndim == 2:
        return value.T
    if layout == HEADS:
        heads = value.reshape(config.num_heads, 3, config.head_dim, *value.shape[1:])
        return heads.swapaxes(0, 1).reshape(value.shape)
    return value


def to_stored(value: np.ndarray, layout: str, config: ModelConfig) -> np.ndarray:
    """The inverse of `from_stored`."""
    if layout == HEADS:
        parts = value.reshape(3, config.num_heads, config.head_dim, *value.shape[1:])
        return parts.swapaxes(0, 1).reshape(value.shape)
    return from_stored(value, layout, config)


def split_sizes(shape: tuple[int, ...], path: str, count: int, config: ModelConfig) -> list[int]:
    """Rows of each of the `count` tensors that a parameter is made of, from top to bottom."""
    rows = math.prod(shape[:-1]) if len(shape) > 1 else shape[0]
    if count == 3 and "/qkv/" in path:
        kv = config.num_kv_heads * config.head_dim
        return [rows - 2 * kv, kv, kv]
    return [rows // count] * count


def split(parameter: np.ndarray, path: str, count: int, config: ModelConfig) -> list[np.ndarray]:
    """The `count` tensors that a parameter was made of, from top to bottom."""
    if parameter.ndim == 3:  # experts
        parameter = parameter.reshape(-1, parameter.shape[-1])
    return np.split(parameter, np.cumsum(split_sizes(parameter.shape, path, count, config))[:-1])
