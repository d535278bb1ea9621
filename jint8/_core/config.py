"""`Config`, which says how to quantize and how to multiply, and the schemes that it can name."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

import numpy as np

OutlierMode = Literal["batch", "token", "static"]
OUTLIER_MODES: tuple[OutlierMode, ...] = get_args(OutlierMode)
Preset = Literal["paper", "static", "rotated", "best", "fast", "w4", "w4-best"]
Grouping = Literal["oc", "ic", "ada"]
GROUPINGS: tuple[Grouping, ...] = get_args(Grouping)
Rounding = Literal["nearest", "gptq"]
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)
LARGEST_BLOCK = 512  # of a rotation: larger matrices cost more than they gain
LARGEST_GROUP = 1024
FOUR_BIT_OPTIONS = ("group", "grouping", "rounding")  # of a `Config`; other schemes have no use for them


@dataclasses.dataclass(frozen=True)
class Scheme:
    """What is quantized, and how finely: a row of Table 1 of the paper (arXiv 2208.07339, section 3), or one like it.

    Attributes:
      activations: one scale per `"token"`, one per `"tensor"`, or None for float activations.
      weights: one scale per output `"channel"`, one per `"tensor"`, a step and a minimum per `"group"` in four bits, or
        None for float weights.
      affine: whether both sides have a zero point.
      decomposition: whether outlier feature dimensions are multiplied in 16 bits.
    """

    activations: Literal["token", "tensor"] | None
    weights: Literal["channel", "tensor", "group"] | None
    affine: bool = False
    decomposition: bool = False

    def __post_init__(self):
        for name, value, known in (
            ("activations", self.activations, ("token", "tensor", None)),
            ("weights", self.weights, ("channel", "tensor", "group", None)),
        ):
            if value not in known:
                raise ValueError(f"Expected {name} to be one of {', '.join(map(str, known))}, got {value!r}.")


SCHEMES = {
    "none": Scheme(None, None),
    "absmax": Scheme("tensor", "tensor"),
    "zeropoint": Scheme("tensor", "tensor", affine=True),
    "row": Scheme("token", "tensor"),
    "row+dec": Scheme("token", "tensor", decomposition=True),
    "vector": Scheme("token", "channel"),
    "vector-zp": Scheme("token", "channel", affine=True),
    "llm.int8": Scheme("token", "channel", decomposition=True),
    "llm.int8-zp": Scheme("token", "channel", affine=True, decomposition=True),
    "int4": Scheme(None, "group", decomposition=True),
    "int4-a8": Scheme("token", "group", decomposition=True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How weights and activations are quantized. Hashable, so it can be static under `jax.jit`.

    Args:
      scheme: a name from Table 1 of the paper: `"llm.int8"` (vector-wise with mixed-precision decomposition),
        `"vector"` (without decomposition), `"none"` (no quantization), and the others in `jint8.SCHEMES`; or `"int4"`,
        weights of four bits and float activations, or `"int4-a8"`, the same weights and int8 activations.
      threshold: a feature dimension with `abs(x) >= threshold` is an outlier. 0 turns decomposition off.
      outliers: who decides that a column is an outlier. `"batch"`: any token of the call (the paper). `"token"`:
        each token for itself, so that a token's result doesn't depend on its neighbours in the batch. `"static"`:
        calibrated columns, of which the weight holds the rows in 16 bits (see `jint8.calibrate`), and beside those
        each token for itself, as in `"token"`.
      relative: the threshold counts in mean magnitudes of the token, `mean(abs(x))` over its features: for models whose
        activations are large throughout, where an absolute one would send most columns to 16 bits.
      digits: int8 digits per activation. 2 writes each as two, 32512 steps to either side instead of 127, for twice the
        rows of the same int8 product; activations then have no zero point.
      rotate: 0, or how many features a Hadamard matrix mixes at most, a power of two: features are smoothed (scaled so
        that weights and activations share the error) and rotated, after which neither has outliers. A `QTensor` has
        here what it was rotated by, the largest power of two up to this that divides the number of its features; 1
        smooths alone. Goes with calibrated outlier columns, which are taken out before, or with none.
      group: in four bits: how many weights share a step and a minimum; where it doesn't divide their number, the last
        group is shorter.
      grouping: in four bits: the weights of a group belong to one output channel (`"oc"`) or to one feature (`"ic"`);
        `"ada"` chooses for each weight what leaves the smaller error of its output, and a `QTensor` has what was
        chosen.
      rounding: in four bits: to the `"nearest"` code; or one feature after another, of which each makes up for the
        error of those before it (`"gptq"`), by the second moments of activations (see `jint8.calibrate`).

    Raises:
      TypeError: `threshold` isn't a real number, `relative` isn't a bool, or `rotate` or `group` isn't an integer.
      ValueError: unknown `scheme`, `outliers`, `grouping` or `rounding`, a negative or non-finite `threshold`, `digits`
        other than 1 and 2, `rotate` that isn't 0 or a power of two up to 512, `rotate` with outliers that the
        activations of a call decide, `group` that isn't a power of two from 2 to 1024, `digits` with float activations
        in four bits, or what is of four bits alone beside another scheme.

    Examples:
      >>> import jint8
      >>> jint8.Config().scheme, jint8.Config().threshold
      ('llm.int8', 6.0)

    References:
      Dettmers et al., LLM.int8(), 2022, arXiv 2208.07339, section 3.
    """

    scheme: str = "llm.int8"
    threshold: float = 6.0
    outliers: OutlierMode = "batch"
    relative: bool = False
    digits: Literal[1, 2] = 1
    rotate: int = 0
    group: int = 64
    grouping: Grouping = "ada"
    rounding: Rounding = "nearest"

    def __post_init__(self):
        if self.scheme not in SCHEMES:
            raise ValueError(f"Expected scheme to be one of {', '.join(SCHEMES)}, got {self.scheme!r}.")
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float, np.integer, np.floating)):
            raise TypeError(f"Expected threshold to be a real number, got {self.threshold!r}.")
        try:
            threshold = float(self.threshold)
        except OverflowError:  # an integer that no float holds
            threshold = math.inf
        if not (threshold >= 0 and math.isfinite(threshold)):
            raise ValueError(f"Expected threshold to be finite and at least 0, got {self.threshold}.")
        if self.outliers not in OUTLIER_MODES:
            raise ValueError(f"Expected outliers to be one of {', '.join(OUTLIER_MODES)}, got {self.outliers!r}.")
        if not isinstance(self.relative, bool):
            raise TypeError(f"Expected relative to be True or False, got {self.relative!r}.")
        if self.digits not in (1, 2):
            raise ValueError(f"Expected digits to be 1 or 2, got {self.digits!r}.")
        object.__setattr__(self, "threshold", threshold)
        object.__setattr__(self, "digits", int(self.digits))
        self._check_rotate()
        self._check_groups()

    def _check_rotate(self) -> None:
        if isinstance(self.rotate, bool) or not isinstance(self.rotate, (int, np.integer)):
            raise TypeError(f"Expected rotate to be an integer, got {self.rotate!r}.")
        if not 0 <= self.rotate <= LARGEST_BLOCK or self.rotate & (self.rotate - 1):
            raise ValueError(f"Expected rotate to be 0 or a power of two up to {LARGEST_BLOCK}, got {self.rotate}.")
        object.__setattr__(self, "rotate", int(self.rotate))
        if self.rotate and self.decomposes and self.outliers != "static":
            # The columns of a call would need their rows of the weight as they were before the rotation.
            raise ValueError(
                "Expected rotate with calibrated outlier columns (outliers='static') or without decomposition "
                f"(scheme='vector', as in the preset 'rotated'; or threshold=0), got outliers={self.outliers!r}."
            )

    def _check_groups(self) -> None:
        if isinstance(self.group, bool) or not isinstance(self.group, (int, np.integer)):
            raise TypeError(f"Expected group to be an integer, got {self.group!r}.")
        if not 2 <= self.group <= LARGEST_GROUP or self.group & (self.group - 1):
            raise ValueError(f"Expected group to be a power of two from 2 to {LARGEST_GROUP}, got {self.group}.")
        object.__setattr__(self, "group", int(self.group))
        if self.grouping not in GROUPINGS:
            raise ValueError(f"Expected grouping to be one of {', '.join(GROUPINGS)}, got {self.grouping!r}.")
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"Expected rounding to be one of {', '.join(ROUNDINGS)}, got {self.rounding!r}.")
        if self.four_bits:
            if self.digits != 1 and self.table_row.activations is None:
                raise ValueError(f"Expected digits=1 with float activations (scheme='int4'), got {self.digits}.")
            return
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in FOUR_BIT_OPTIONS:
            if (value := getattr(self, name)) != defaults[name]:
                raise ValueError(
                    f"Expected {name} with scheme='int4' or 'int4-a8', got {name}={value!r} with {self.scheme!r}."
                )

    @classmethod
    def preset(cls, name: Preset) -> Config:
        """A choice that was measured; docs/quality.md has the numbers.

        Args:
          name: `"paper"`: LLM.int8() as published, `Config()`. `"static"`: calibrated outlier columns and zero points.
            `"rotated"`: features smoothed and rotated, then one int8 product without decomposition.
            `"best"`: that, and two digits per activation: what is left is the error of int8 weights alone.
            `"fast"`: zero points and no decomposition.
            `"w4"`: weights of four bits, of features that were smoothed and rotated, beside calibrated columns in 16
            bits; float activations. `"w4-best"`: that by GPTQ, which takes minutes where `"w4"` takes seconds.

        Returns:
          The config.

        Raises:
          ValueError: unknown name.

        Examples:
          >>> import jint8
          >>> jint8.Config.preset("paper") == jint8.Config()
          True
        """
        if name not in PRESETS:
            raise ValueError(f"Expected a preset among {', '.join(PRESETS)}, got {name!r}.")
        return cls(**PRESETS[name])

    @property
    def table_row(self) -> Scheme:
        """The row of the paper's Table 1 that `scheme` names: what is quantized, and how finely."""
        return SCHEMES[self.scheme]

    @property
    def quantizes_weights(self) -> bool:
        """Whether weights become int8, or codes of four bits: all schemes but `"none"`."""
        return self.table_row.weights is not None

    @property
    def four_bits(self) -> bool:
        """Whether weights are codes of four bits, two to a byte."""
        return self.table_row.weights == "group"

    @property
    def decomposes(self) -> bool:
        """Whether outlier dimensions are split off: the scheme says so and the threshold isn't 0.

        Of float activations only calibrated columns are, whose weights stay in 16 bits.
        """
        row = self.table_row
        return row.decomposition and self.threshold > 0 and (row.activations is not None or self.outliers == "static")

    @property
    def uses_calibrated_columns(self) -> bool:
        """Whether outlier columns that were found by calibration are multiplied in 16 bits."""
        return self.decomposes and self.outliers == "static"

    @property
    def depends_on_batch(self) -> bool:
        """Whether a token's result depends on the other tokens of the call."""
        return self.table_row.activations == "tensor" or (self.decomposes and self.outliers == "batch")

    @property
    def is_calibrated(self) -> bool:
        """Whether weights are quantized by what is known of activations: outlier columns, or how large features are."""
        chooses = self.four_bits and (self.grouping == "ada" or self.rounding == "gptq")
        return self.quantizes_weights and (self.uses_calibrated_columns or self.rotate > 0 or chooses)

    def for_calibration(self) -> Config:
        """The config of an int8 model on which this one's outlier columns and root mean squares are found."""
        if self.four_bits:
            return Config(threshold=self.threshold, relative=self.relative, outliers="token")
        scheme = self.scheme if self.table_row.decomposition else Config().scheme
        return dataclasses.replace(self, scheme=scheme, outliers="token", rotate=0)

    def by_token(self) -> Config:
        """This config with outliers decided by each token for itself, where any token of the call would decide.

        What several rows of a call need so that none depends on its neighbours. Calibrated columns stay.
        """
        return dataclasses.replace(self, outliers="token") if self.outliers == "batch" else self


PRESETS: dict[Preset, dict[str, Any]] = {
    "paper": {},
    "static": {"scheme": "llm.int8-zp", "outliers": "static"},
    "rotated": {"scheme": "vector", "rotate": 64},
    "best": {"scheme": "vector", "rotate": 64, "digits": 2},
    "fast": {"scheme": "vector-zp"},
    "w4": {"scheme": "int4", "rotate": 64, "outliers": "static"},
    "w4-best": {"scheme": "int4", "rotate": 64, "outliers": "static", "grouping": "oc", "rounding": "gptq"},
}


def check_config(config: Any) -> None:
    """Raises TypeError unless `config` is a `Config`."""
    if not isinstance(config, Config):
        raise TypeError(f"Expected config to be a jint8.Config, got {type(config).__name__}.")
