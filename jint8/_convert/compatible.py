"""Which configs run on int8 weights as they are stored, and the words in which others are refused."""

from __future__ import annotations

import dataclasses

from jint8._core.config import PRESETS, SCHEMES, Config


def check_runs(config: Config, own: Config, *, columns: bool) -> None:
    """Raises ValueError unless weights can be multiplied by `config` as they are stored; it says by which they can.

    Args:
      config: to multiply by.
      own: the config that they were quantized by.
      columns: whether rows of the weights are stored in 16 bits, those of calibrated outlier columns.
    """
    if (found := _obstacle(config, own, columns)) is not None:
        expected, got = found
        raise ValueError(
            f"Expected {expected} ({_what_runs(own, columns)}), got {got}: quantize the original checkpoint instead."
        )


def _obstacle(config: Config, own: Config, columns: bool) -> tuple[str, str] | None:
    """What is expected of a config and what it has; None where it runs."""
    wanted, got = config.table_row, own.table_row
    if (wanted.weights, wanted.affine) != (got.weights, got.affine):
        return f"a scheme that runs on weights quantized by {own.scheme!r}", repr(config.scheme)
    if own.four_bits:
        if config.rounding != own.rounding:
            return (
                f"a config with rounding={own.rounding!r}, as the model was saved with",
                f"rounding={config.rounding!r}",
            )
        if wanted.activations is None:  # what else a config has makes no difference then
            return None
    if bool(config.rotate) != bool(own.rotate):
        return f"a config with rotate={own.rotate}, as the model was saved with", f"rotate={config.rotate}"
    if config.uses_calibrated_columns and not columns:
        return "outliers by batch or by token for weights that hold no calibrated columns", "outliers='static'"
    return None


def _what_runs(own: Config, columns: bool) -> str:
    """The presets and schemes that run, as in `"presets: paper; schemes: vector, llm.int8"`."""
    presets = [name for name in PRESETS if _obstacle(Config.preset(name), own, columns) is None]
    schemes = [name for name in SCHEMES if _runs_by(name, own, columns)]
    named: dict[str, list[str]] = {"presets": [*presets], "schemes": schemes}
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in named.items() if names)


def _runs_by(scheme: str, own: Config, columns: bool) -> bool:
    """Whether the weights run by their own config with another scheme."""
    try:
        config = dataclasses.replace(own, scheme=scheme)
    except ValueError:  # such as rotation with outliers that the activations of a call decide
        return False
    return _obstacle(config, own, columns) is None
