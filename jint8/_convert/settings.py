"""How to quantize: what the caller asks for, and what the checkpoint's `config.json` does."""

from __future__ import annotations

from jint8._convert import bitsandbytes as bitsandbytes
from jint8._core.config import Config
from jint8._trees.paths import Selection, matches
from jint8.checkpoints import Checkpoint


def resolve_settings(
    checkpoint: Checkpoint, *, config: Config | None, quantize: bool, selection: Selection
) -> tuple[Config, Selection]:
    """How to quantize, and which weights: what the caller asks for, and the checkpoint's `quantization_config`.

    Args:
      checkpoint: to be quantized, or in int8 of bitsandbytes.
      config: of the caller; None is that of the checkpoint, or else the default.
      quantize: False keeps every weight in floating point.
      selection: of the caller; what the checkpoint wants to be skipped is added.

    Raises:
      ValueError: the checkpoint is quantized in a way that isn't supported; or it is in int8, and the caller chooses
        weights, or a scheme that doesn't run on its values.
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
        if config.rotate:
            raise ValueError(
                f"{checkpoint.path}: Expected a config without rotate for weights that are in int8 already, got "
                f"rotate={config.rotate}."
            )
        if not quantize or selection != Selection():
            raise ValueError(f"{checkpoint.path}: Expected a checkpoint in floating point, got int8 of bitsandbytes.")
        if scheme.affine or scheme.weights != "channel":
            raise ValueError(
                f"{checkpoint.path}: Expected a scheme that runs on int8 rows with a scale each, got {config.scheme!r}."
            )
    own = selection.skip
    skip = own if not asked.skip else lambda path: matches(path, own) or matches(path, asked.skip)
    return config, Selection(skip, selection.include)
