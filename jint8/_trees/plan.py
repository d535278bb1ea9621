"""`Plan`: which leaves of a parameter tree are multiplied, and over which axes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from jint8._trees.paths import matches

Axes = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Plan(Mapping[str, Axes]):
    """Which leaves of a parameter tree are matrix-multiplied, and over which axes.

    A mapping from a leaf's path to its contracted axes, as `jint8.plan` finds them and `jint8.quantize_params` takes
    them. Axes are non-negative and in the leaf's own numbering. Printing a plan shows it as a table; `without` and
    `with_` return edited copies. They take patterns, which match (as in `fnmatch`) any run of whole path segments:
    ``"lm_head"`` and ``"attn/q_*"`` match everything below such a folder, or a leaf of that name.

    Attributes:
      contracted: the mapping itself.
      stacked: for the same leaves, and those of `tied`, the axes that are neither contracted nor output channels:
        scanned layers, experts, slices that are taken one at a time. `()` says that there are none; of a leaf that
        isn't here nothing is known.
      skipped: for every other leaf, the reason.
      tied: the contracted axes of leaves that are skipped only because they are looked up as well, such as an
        embedding that is also the output head.
      shapes: the shape of every leaf.

    Examples:
      >>> found = Plan({"head/kernel": (0,)}, shapes={"head/kernel": (64, 100)})
      >>> found["head/kernel"]
      (0,)
      >>> found.without("head").skipped
      {'head/kernel': 'left out'}
    """

    contracted: Mapping[str, Axes]
    stacked: Mapping[str, Axes] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, Axes] = field(default_factory=dict)
    shapes: Mapping[str, Axes] = field(default_factory=dict)

    def __getitem__(self, path: str) -> Axes:
        return self.contracted[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.contracted)

    def __len__(self) -> int:
        return len(self.contracted)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Plan):
            return vars(self) == vars(other)
        return Mapping.__eq__(self, other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Plan({len(self)} contracted, {len(self.skipped)} skipped)"

    def __str__(self) -> str:
        contracted = [
            (path, str(self.shapes.get(path, "")), str(axes), str(self.stacked.get(path) or ""))
            for path, axes in self.contracted.items()
        ]
        skipped = [(path, str(self.shapes.get(path, "")), reason) for path, reason in self.skipped.items()]
        return "\n".join(
            [
                *_table(("contracted", "shape", "axes", "stacked"), contracted),
                "",
                *_table(("skipped", "shape", "reason"), skipped),
            ]
        )

    @classmethod
    def of(cls, plan: Mapping[str, int | Sequence[int]]) -> Plan:
        """The plan that a mapping from path to contracted axes stands for; a `Plan` itself.

        A mapping of another type doesn't say which axes are stacked, not even if it is `dict(plan)` of a `Plan`.

        Args:
          plan: a `Plan`, or any mapping from path to contracted axes.

        Returns:
          A `Plan`.

        Raises:
          TypeError: `plan` isn't a mapping.

        Examples:
          >>> Plan.of({"head/kernel": 0})["head/kernel"]
          (0,)
        """
        if isinstance(plan, cls):
            return plan
        if not isinstance(plan, Mapping):
            raise TypeError(f"Expected a plan to be a mapping from path to contracted axes, got {type(plan).__name__}.")
        return cls({path: tuple(axes) if isinstance(axes, Iterable) else (axes,) for path, axes in plan.items()})

    def stack_axes(self, path: str, ndim: int) -> Axes | None:
        """The stacked axes of a leaf of `ndim` dimensions; None where any but the contracted ones may be stacked.

        A matrix has none: of its two axes one is contracted, and the other the output channels.
        """
        return self.stacked.get(path, () if ndim <= 2 else None)

    def without(self, *patterns: str | Callable[[str], bool]) -> Plan:
        """Leaves some leaves out.

        Args:
          *patterns: path patterns or predicates that take the path.

        Returns:
          A plan in which the leaves that match any of them are skipped.

        Examples:
          >>> sorted(Plan({"a/kernel": (0,), "b/kernel": (0,)}).without("b"))
          ['a/kernel']
        """
        out = [path for path in self if any(matches(path, pattern) for pattern in patterns)]
        return replace(
            self,
            contracted={path: axes for path, axes in self.items() if path not in out},
            stacked={path: axes for path, axes in self.stacked.items() if path not in out},
            skipped={**self.skipped, **dict.fromkeys(out, "left out")},
        )

    def with_(self, contracted: Mapping[str, Sequence[int]]) -> Plan:
        """Adds leaves, or corrects their contracted axes.

        Of a leaf whose contracted axes change, the stacked ones aren't known any more, unless only one axis is left.

        Args:
          contracted: contracted axes by path, or by path pattern; negative ones count from the end.

        Returns:
          A plan in which all leaves that match are contracted over these axes.

        Raises:
          ValueError: if a pattern matches no leaf, or if a leaf doesn't have the axes or has no others.

        Examples:
          >>> found = Plan({}, skipped={"embedding": "embedding lookup"}, shapes={"embedding": (100, 64)})
          >>> dict(found.with_({"embedding": (-1,)}))
          {'embedding': (1,)}
        """
        new: dict[str, Axes] = {}
        for pattern, axes in contracted.items():
            paths = [pattern] if pattern in self.shapes else [path for path in self.shapes if matches(path, pattern)]
            if not paths:
                raise ValueError(f"Expected a pattern that matches a leaf of the plan, got {pattern!r}.")
            new |= {path: _checked_axes(path, self.shapes[path], axes) for path in paths}
        before = {**self.tied, **self.contracted}
        changed = {
            path for path, axes in new.items() if path in self.stacked and set(axes) != set(before.get(path, ()))
        }
        alone = {path: () for path in changed if len(self.shapes[path]) - len(new[path]) == 1}
        return replace(
            self,
            contracted={**self.contracted, **new},
            stacked={**{path: axes for path, axes in self.stacked.items() if path not in changed}, **alone},
            skipped={path: reason for path, reason in self.skipped.items() if path not in new},
            tied={path: axes for path, axes in self.tied.items() if path not in new},
        )


def _checked_axes(path: str, shape: Axes, axes: Sequence[int]) -> Axes:
    rank = len(shape)
    if any(not -rank <= axis < rank for axis in axes):
        raise ValueError(f"Expected axes of {path!r} with shape {shape}, got {tuple(axes)}.")
    checked = {axis % rank for axis in axes}
    if not 0 < len(checked) < rank:
        raise ValueError(f"Expected some but not all axes of {path!r} with shape {shape}, got {tuple(axes)}.")
    return tuple(sorted(checked))


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
