"""How to quantize, by the caller and by the checkpoint's own configuration."""

from __future__ import annotations

from jint8._convert import bitsandbytes as bitsandbytes
from jint8._core.config import Config
from jint8._trees.paths import Patterns, matches
from jint8.checkpoints import Checkpoint


def settings(
    checkpoint: Checkpoint, *, config: Config | None, quantize: bool, skip: Patterns, include: Patterns
) -> tuple[Config, Patterns]:
    """How to quantize and what to skip, by the caller and by the checkpoint's `quantization_config`.

    Raises:
      ValueError: the checkpoint is quantized in a way that isn't supported, or in int8 and the caller asks for more
        than another threshold.
    """
    try:
        asked = bitsandbytes.options(checkpoint.config)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from None
    if not quantize:
        config = Config(scheme="none")
    elif config is None:
        config = Config() if asked.threshold is None else Config(threshold=asked.threshold)
    if bitsandbytes.is_int8(checkpoint):
        scheme = config.table_row
        if not quantize or callable(skip) or callable(include) or list(skip) or list(include):
            raise ValueError(f"{checkpoint.path}: Expected a checkpoint in floating point, got int8 of bitsandbytes.")
        if scheme.affine or scheme.weights != "channel":
            raise ValueError(
                f"{checkpoint.path}: Expected a scheme that runs on int8 rows with a scale each, got {config.scheme!r}."
            )
    return config, lambda path: matches(path, skip) or matches(path, asked.skip)
