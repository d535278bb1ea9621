"""Which tensors of a checkpoint make up a parameter, and how to split the parameter into them again."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from jint8.models._config import ModelConfig


class Source(NamedTuple):
    """The tensors of a checkpoint that make up a parameter.

    Attributes:
      tensors: their names; stacked above each other they have the parameter's rows.
      transposed: stored as `[k, n]`.
      order: `parameter = stacked[order]`, by rows; None where the order is the same.
    """

    tensors: tuple[str, ...]
    transposed: bool = False
    order: np.ndarray | None = None


def split_sizes(shape: tuple[int, ...], path: str, count: int, config: ModelConfig) -> list[int]:
    """Rows of each of the `count` tensors that a parameter is made of, from top to bottom."""
    rows = math.prod(shape[:-1]) if len(shape) > 1 else shape[0]
    if count == 3 and "/qkv/" in path:
        kv = config.num_kv_heads * config.head_dim
        return [rows - 2 * kv, kv, kv]
    return [rows // count] * count


def split(parameter: np.ndarray, path: str, source: Source, config: ModelConfig) -> list[np.ndarray]:
    """The tensors that a parameter was made of, with their rows first."""
    sizes = split_sizes(parameter.shape, path, len(source.tensors), config)
    if parameter.ndim == 3:  # experts
        parameter = parameter.reshape(-1, parameter.shape[-1])
    if source.order is not None:
        parameter = parameter[np.argsort(source.order)]
    return np.split(parameter, np.cumsum(sizes)[:-1])
