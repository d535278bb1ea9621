"""What `jint8.check` finds: printable, and as JSON."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from jint8._ops.product import KERNELS_ON_GPU, LIBRARY_ON_CPU
from jint8._trees.paths import path_group

SHOWN = 10  # products of a printed table, or groups of weights in floating point, unless more are asked for
_IN_FLOAT = ("dequantize", "xla_blocks")  # paths that keep activations in floating point
_NAMES = {"triton": "Triton", "mosaic": "Mosaic", KERNELS_ON_GPU: "Pallas kernels", LIBRARY_ON_CPU: "native"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
    """A weight's products, held against those of its float weight.

    Attributes:
      path: of the weight, with `[index]` for an entry of a stacked one.
      error: norm of the difference from the float result, relative to that of the float result; inf where that is 0.
      weight_error: the same of the dequantized weight and the float one.
      implementations: the names of `jint8.IMPLEMENTATIONS` that computed the products.
    """

    path: str
    error: float
    weight_error: float
    implementations: tuple[str, ...]

    @property
    def is_int8(self) -> bool:
        """Whether activations were in int8, too."""
        return not set(self.implementations) <= set(_IN_FLOAT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """How far a model's int8 products are from its float ones; printable.

    Attributes:
      products: the worst first.
      skipped: for weights that stay in floating point, or whose products weren't seen, why.
      error: of the model's result, as that of a product. Here the errors of all layers add up.
      weights_known: whether there were float weights to compare with; else they are the dequantized ones.
    """

    products: tuple[Checked, ...]
    skipped: dict[str, str]
    error: float
    weights_known: bool = True

    @property
    def ran_int8(self) -> bool:
        """Whether any product was computed in int8."""
        return any(product.is_int8 for product in self.products)

    @property
    def implementations(self) -> dict[str, int]:
        """How many products each implementation computed."""
        return dict(Counter(name for product in self.products for name in product.implementations))

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "ran_int8": self.ran_int8,
            "implementations": {_said(name): count for name, count in self.implementations.items()},
            "error": self.error,
            "weights_known": self.weights_known,
            "products": [dataclasses.asdict(product) for product in self.products],
            "skipped": self.skipped,
        }

    def __str__(self):
        return self.table()

    def table(self, worst: int = SHOWN) -> str:
        """As text, with so many of the products that are worst."""
        ran = [f"{count} by {_said(name)}" for name, count in self.implementations.items()]
        int8 = sum(product.is_int8 for product in self.products)
        lines = [
            f"{int8} of {len(self.products)} compared products ran in int8" + (f": {', '.join(ran)}" if ran else ""),
            f"error of the model's result: {self.error:.3%}",
        ]
        if not self.weights_known:
            lines.append("no float weights to compare with: the errors are those of the activations alone")
        if self.products:
            lines += ["", _row("the worst products", "error", "of the weight", "implementation")]
        for product in self.products[:worst]:
            cells = (
                f"{product.error:.3%}",
                f"{product.weight_error:.3%}",
                ", ".join(map(_said, product.implementations)),
            )
            lines.append(_row(product.path, *cells))
        if len(self.products) > worst:
            lines.append(f"and {len(self.products) - worst} more")
        groups = Counter((path_group(path), reason) for path, reason in self.skipped.items())
        if groups:
            lines += ["", "not compared, in floating point:"]
        for (group, reason), count in list(groups.items())[:SHOWN]:
            lines.append(f"  {group}{f' ({count} times)' if count > 1 else ''}: {reason}")
        if len(groups) > SHOWN:
            lines.append(f"  and {len(groups) - SHOWN} more")
        return "\n".join(lines)


def _row(name: str, *cells: str) -> str:
    return f"{name:40}{cells[0]:>10}{cells[1]:>15}  {cells[2]}".rstrip()


def _said(implementation: str) -> str:
    """The implementation as people know it."""
    if implementation in _IN_FLOAT:
        return f"XLA in floating point ({implementation})"
    return _NAMES.get(implementation, f"XLA ({implementation})")
