"""Which axes of a parameter an array still shows, after transposes, reshapes and slices.

Pure bookkeeping on shapes: the interpreter in `jint8._tracing.uses` holds one `View` for every intermediate array that
is still a rearranged parameter.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import prod

__all__ = ["View"]

Axes = tuple[int, ...]


@dataclass(frozen=True)
class View:
    """A rearranged parameter.

    Attributes:
      leaf: which parameter, by its number.
      leaf_shape: its own shape.
      axes: for each axis of the view, the axes of the parameter that it runs over: one after a transpose, several
        after a reshape that merges, none where the view repeats the parameter or has a new axis of size 1. After a
        reshape that splits an axis, several axes of the view name the same one.
      stacked: axes of the parameter of which the view holds one entry.
      looked_up: whether these entries were picked by an array of indices.
      quantized: of a parameter that the function itself turned to int8, the axes that its scales say are contracted;
        None of one that is still in floating point.
    """

    leaf: int
    leaf_shape: Axes
    axes: tuple[Axes, ...]
    stacked: frozenset[int] = frozenset()
    looked_up: bool = False
    quantized: frozenset[int] | None = None

    @classmethod
    def of_leaf(cls, leaf: int, shape: Axes) -> "View":
        """The view that is the whole parameter."""
        return cls(leaf, shape, tuple((axis,) for axis in range(len(shape))))

    def covers(self, positions: Iterable[int]) -> frozenset[int]:
        """The axes of the parameter behind some axes of the view."""
        return frozenset(axis for position in positions for axis in self.axes[position])

    def permuted(self, order: Sequence[int]) -> "View":
        """The view after a transpose."""
        return replace(self, axes=tuple(self.axes[position] for position in order))

    def indexed(self, positions: Iterable[int]) -> "View":
        """The view without some axes, of which one entry was taken (as by a scan) or is left (as in a squeeze)."""
        gone = set(positions)
        # An axis that has size 1 in the parameter itself is a shape's convention, not a stack of layers.
        stacked = {axis for axis in self.covers(gone) if self.leaf_shape[axis] > 1}
        kept = tuple(axes for position, axes in enumerate(self.axes) if position not in gone)
        return replace(self, axes=kept, stacked=self.stacked | stacked)

    def broadcast(self, rank: int, positions: Sequence[int]) -> "View":
        """The view spread over an array of `rank` axes, its own being at `positions`."""
        axes: list[Axes] = [()] * rank
        for own, position in zip(self.axes, positions, strict=True):
            axes[position] = own
        return replace(self, axes=tuple(axes))

    def reshaped(self, before: Sequence[int], after: Sequence[int]) -> "View":
        """The view after a reshape from shape `before` to shape `after`.

        Where the new axes aren't unions of whole axes of the parameter, each of them names all that it may touch.
        """
        axes: list[Axes] = []
        dropped: list[int] = []
        if 0 in before:
            return replace(self, axes=(tuple(range(len(self.leaf_shape))),) * len(after))
        i = j = 0
        while i < len(before) or j < len(after):
            if i < len(before) and j < len(after) and before[i] == after[j]:
                axes.append(self.axes[i])
                i, j = i + 1, j + 1
            elif j < len(after) and after[j] == 1:
                axes.append(())
                j += 1
            elif i < len(before) and before[i] == 1:
                dropped.append(i)
                i += 1
            else:
                i_end, j_end = _group(before, after, i, j)
                dropped += [position for position in range(i, i_end) if before[position] == 1]
                axes += self._regrouped(i, i_end, before, after[j:j_end])
                i, j = i_end, j_end
        return replace(self.indexed(dropped), axes=tuple(axes))

    def _regrouped(self, start: int, stop: int, before: Sequence[int], sizes: Sequence[int]) -> list[Axes]:
        positions = [position for position in range(start, stop) if before[position] != 1]
        # Only neighbours are merged: an axis that still comes twice was split and permuted, and the sizes below differ.
        group = tuple(axis for axis, _ in groupby(axis for position in positions for axis in self.axes[position]))
        vague: list[Axes] = [group if size != 1 else () for size in sizes]
        whole = all(self.axes[position] for position in positions)
        if not whole or prod(self.leaf_shape[axis] for axis in group) != prod(sizes):
            return vague
        exact: list[Axes] = []
        rest = list(group)
        for size in sizes:
            taken: list[int] = []
            while rest and prod(self.leaf_shape[axis] for axis in taken) < size:
                taken.append(rest.pop(0))
            if prod(self.leaf_shape[axis] for axis in taken) != size:
                return vague
            exact.append(tuple(taken))
        return exact


def _group(before: Sequence[int], after: Sequence[int], i: int, j: int) -> tuple[int, int]:
    """The ends of the shortest runs of axes from `i` and `j` on that hold the same number of entries."""
    i_end, j_end = i + 1, j + 1
    while (left := prod(before[i:i_end])) != (right := prod(after[j:j_end])):
        if left < right:
            i_end += 1
        else:
            j_end += 1
    return i_end, j_end
