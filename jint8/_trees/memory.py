"""What parameter trees weigh."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax

from jint8._core.config import Config
from jint8._core.qtensor import is_qtensor
from jint8._trees.params import quantized
from jint8._trees.paths import leaf_paths, path_group


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Bytes of parameters, before and after quantization.

    Attributes:
      groups: from the name of a group of leaves (paths with layer numbers as `*`) to (bytes in floating point,
        bytes).
    """

    groups: dict[str, tuple[int, int]]

    @property
    def float_bytes(self) -> int:
        """Bytes of all leaves as they were before quantization."""
        return sum(before for before, _ in self.groups.values())

    @property
    def bytes(self) -> int:
        """Bytes of all leaves as they are."""
        return sum(after for _, after in self.groups.values())

    def __str__(self):
        rows = [(name, *sizes) for name, sizes in self.groups.items()] + [("total", self.float_bytes, self.bytes)]
        width = max(len(name) for name, *_ in rows)
        lines = [f"{'':{width}} {'float bytes':>15} {'bytes':>15} {'ratio':>6}"]
        for name, before, after in rows:
            lines.append(f"{name:{width}} {before:15,} {after:15,} {after / before if before else 1:6.3f}")
        return "\n".join(lines)


def memory_report(params: Any) -> MemoryReport:
    """How many bytes a tree of parameters takes, and took before quantization.

    Args:
      params: any pytree of arrays (or `jax.ShapeDtypeStruct`s) and `QTensor`s. Other leaves aren't counted.

    Returns:
      A printable `MemoryReport`: bytes per group of leaves that differ only in a layer's number, and totals.

    Examples:
      >>> import jax.numpy as jnp, jint8
      >>> report = jint8.memory_report(jint8.quantize_params({"kernel": jnp.ones((64, 8))}))
      >>> report.float_bytes, report.bytes
      (2048, 544)
    """
    groups: dict[str, tuple[int, int]] = {}
    for path, leaf in leaf_paths(params, is_leaf=is_qtensor):
        group = path_group(path)
        if not hasattr(leaf, "dtype"):
            continue
        # The dtype's own itemsize: random keys have a dtype of JAX's, which NumPy doesn't know.
        before = math.prod(leaf.shape) * leaf.dtype.itemsize
        after = leaf.nbytes if is_qtensor(leaf) else before
        total = groups.get(group, (0, 0))
        groups[group] = (total[0] + before, total[1] + after)
    return MemoryReport(groups)


def projection_bytes(params: Any) -> int:
    """Bytes of the `QTensor`s in a tree; where there are none, of the weights that `quantize_params` would turn."""
    is_projection = jax.tree.map(is_qtensor, params, is_leaf=is_qtensor)
    if not any(jax.tree.leaves(is_projection)):
        is_projection = jax.tree.map(
            is_qtensor, jax.eval_shape(functools.partial(quantized, config=Config()), params), is_leaf=is_qtensor
        )
    nbytes = jax.tree.map(lambda leaf, counts: leaf.nbytes * counts, params, is_projection, is_leaf=is_qtensor)
    return sum(jax.tree.leaves(nbytes))
