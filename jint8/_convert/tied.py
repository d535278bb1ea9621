"""An output head that a configuration says is the embedding, beside a tensor of its own that may differ."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np

from jint8._convert import int8_weights as int8_weights
from jint8.checkpoints import Checkpoint
from jint8.models import ModelConfig
from jint8.models.families import HEAD, family, sources

ROWS = 4096  # at a time


def with_own_head(checkpoint: Checkpoint, config: ModelConfig) -> ModelConfig:
    """`config` with `tie_embeddings=False` where the checkpoint has a head of other values than the embedding's.

    As transformers does, such a head is used, with a warning that names its file.
    """
    head = f"{family(config).modules[HEAD]}.weight"
    if not config.tie_embeddings or head not in checkpoint.tensors:
        return config
    (embedding,) = sources(config, ["embedding"], checkpoint.tensors)["embedding"].tensors
    if embedding not in checkpoint.tensors or _equal(checkpoint, head, embedding):
        return config  # a missing embedding is an error of its own
    warnings.warn(
        f"{checkpoint.tensors[head].file}: tensor {head!r} differs from {embedding!r}, though tie_word_embeddings says "
        "that they are one: it is used as the output head.",
        stacklevel=2,
    )
    return dataclasses.replace(config, tie_embeddings=False)


def _equal(checkpoint: Checkpoint, a: str, b: str) -> bool:
    """Whether two tensors have the same values, in whatever dtypes; a few rows of each are in memory.

    Where one is in int8 they only are with the same scales.
    """
    beside = [int8_weights.companions(checkpoint, name) for name in (a, b)]
    if any(beside):
        kinds = [[name.rpartition(".")[2] for name in names] for names in beside]
        if kinds[0] != kinds[1] or not all(_equal(checkpoint, *pair) for pair in zip(*beside, strict=True)):
            return False
    shape = checkpoint.tensors[a].shape
    if shape != checkpoint.tensors[b].shape or not shape:
        return False
    for start in range(0, shape[0], ROWS):
        x, y = (checkpoint.read_rows(name, start, min(start + ROWS, shape[0])) for name in (a, b))
        if not np.array_equal(x.astype(np.float32), y.astype(np.float32)):
            return False
    return True
