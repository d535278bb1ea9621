"""What is known of the activations that meet each weight: their outlier columns, and how large their features are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from jint8._core.config import Config


class Calibration(dict[str, Any]):
    """From the path of a weight to its outlier columns, with the root mean squares of all features beside them.

    What `jint8.calibrate` returns, and `outliers=` of `jint8.quantize_params` takes.

    Attributes:
      rms: from path to float32 `[k]`, or `[*stack, k]` for stacked weights: the root mean square of each feature of the
        activations over tokens, by which `Config(rotate=)` smooths.
      moments: from path to float32 `[k, k]`, or `[*stack, k, k]`: their second moments, `E[x x.T]`, by which
        `Config(rounding="gptq")` rounds; empty unless they were asked for.
    """

    def __init__(self, columns: Mapping[str, Any], rms: Mapping[str, Any], moments: Mapping[str, Any] | None = None):
        super().__init__(columns)
        self.rms, self.moments = dict(rms), dict(moments or {})

    def __reduce__(self):
        return Calibration, (dict(self), self.rms, self.moments)

    def copy(self) -> Calibration:
        """Another one with the same arrays."""
        return Calibration(self, self.rms, self.moments)

    def __or__(self, other: Any) -> Any:
        rms, moments = (getattr(other, name, {}) for name in ("rms", "moments"))
        return Calibration({**self, **other}, self.rms | rms, self.moments | moments)

    def __ror__(self, other: Any) -> Any:
        return Calibration({**other, **self}, self.rms, self.moments)


jax.tree_util.register_pytree_node(
    Calibration,
    lambda known: ((dict(known), known.rms, known.moments), None),
    lambda _, children: Calibration(*children),
)


def check_calibrated(outliers: Any) -> None:
    """Raises TypeError unless `outliers` maps paths to columns, as what `jint8.calibrate` returns; None is none."""
    if outliers is not None and not isinstance(outliers, Mapping):
        raise TypeError(
            "Expected outliers to map paths to columns, as jint8.calibrate returns them (who decides what an outlier "
            f"is, is said by jint8.Config(outliers=...)), got {outliers!r}."
        )


def calibrated_paths(outliers: Mapping[str, Any] | None) -> set[str]:
    """The paths of the weights of which anything is known."""
    return {*(outliers or ()), *getattr(outliers, "rms", ()), *getattr(outliers, "moments", ())}


def only(outliers: Mapping[str, Any] | None, path: str) -> Mapping[str, Any] | None:
    """What is known of one weight; None where that is nothing."""
    if path not in calibrated_paths(outliers):
        return None
    assert outliers is not None
    columns, *known = (
        {path: of[path]} if path in of else {}
        for of in (outliers, getattr(outliers, "rms", {}), getattr(outliers, "moments", {}))
    )
    return Calibration(columns, *known) if isinstance(outliers, Calibration) else columns


def of_weight(outliers: Mapping[str, Any] | None, path: str, config: Config) -> dict[str, Any]:
    """The arguments of `quantize` that say what is known of a weight's activations: those that `config` has a use for.

    A scheme without decomposition leaves a `Calibration`'s columns alone if it rotates: then it wants the rest. So does
    one of four bits, unless its config says that outliers are static.
    """
    columns = None if outliers is None else outliers.get(path)
    if isinstance(outliers, Calibration) and config.four_bits:
        columns = columns if config.uses_calibrated_columns else None
        return {"outliers": columns, "rms": outliers.rms.get(path), "moments": outliers.moments.get(path)}
    if not isinstance(outliers, Calibration) or not config.rotate:
        return {"outliers": columns}
    return {"outliers": columns if config.table_row.decomposition else None, "rms": outliers.rms.get(path)}
