"""Which parameters of a model are projections, found by tracing it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from jint8._tracing.uses import LOOKUP, Use, find_uses
from jint8._trees.paths import leaf_paths, matches

__all__ = ["Plan", "plan"]

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
            scanned layers, experts, slices that are taken one at a time.
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

    def without(self, *patterns: str | Callable[[str], bool]) -> "Plan":
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

    def with_(self, contracted: Mapping[str, Sequence[int]]) -> "Plan":
        """Adds leaves, or corrects their contracted axes.

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
        stacked = {path: tuple(a for a in self.stacked.get(path, ()) if a not in axes) for path, axes in new.items()}
        return replace(
            self,
            contracted={**self.contracted, **new},
            stacked={**self.stacked, **stacked},
            skipped={path: reason for path, reason in self.skipped.items() if path not in new},
            tied={path: axes for path, axes in self.tied.items() if path not in new},
        )


def plan(apply_fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Plan:
    """Finds which parameters a function contracts in matrix products, and over which axes.

    The function is traced, not run: with parameters from `jax.eval_shape`, a model of any size is planned without
    memory for its weights. Each parameter is followed through casts, transposes, reshapes, slices, scans, conditions,
    remat, jit and custom derivatives to the operation that uses it. Parameters that are used in any way but as one side
    of a product are skipped, with the reason. An axis may be sliced before the product: the plan then names the
    contracted axes, but code that replaces whole layers may not be able to use them.

    For an nnx model, split it: ``graphdef, state = nnx.split(model)``, then
    ``jint8.plan(lambda state, x: nnx.merge(graphdef, state)(x), state, x)``.

    Args:
        apply_fn: a function of the parameters and `args`, such as `module.apply` of a linen module.
        params: a tree of parameters: arrays or `jax.ShapeDtypeStruct`.
        *args: further arguments; every leaf that has no shape and dtype is taken as static.
        **kwargs: likewise.

    Returns:
        The plan. Paths are relative to `params`; a leading ``params/`` is dropped.

    Raises:
        TypeError: if `apply_fn` isn't callable.
        ValueError: if `params` has no array leaves, or two of the same path.

    Examples:
        >>> import jax, jax.numpy as jnp, jint8
        >>> params = {
        ...     "embedding": jax.ShapeDtypeStruct((1000, 64), jnp.float32),
        ...     "up": {"kernel": jax.ShapeDtypeStruct((64, 256), jnp.float32)},
        ... }
        >>> def apply(params, tokens):
        ...     return params["embedding"][tokens] @ params["up"]["kernel"]
        >>> print(jint8.plan(apply, params, jax.ShapeDtypeStruct((1, 8), jnp.int32)))
        contracted  shape      axes  stacked
        up/kernel   (64, 256)  (0,)
        <BLANKLINE>
        skipped    shape       reason
        embedding  (1000, 64)  embedding lookup
    """
    if not callable(apply_fn):
        raise TypeError(f"Expected apply_fn to be callable, got {type(apply_fn).__name__}.")
    leaves = [(path, leaf) for path, leaf in leaf_paths(params) if _is_array(leaf)]
    if not leaves:
        raise ValueError("Expected params to have array leaves, got none.")
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves}
    if len(shapes) < len(leaves):
        paths = [path for path, _ in leaves]
        raise ValueError(f"Expected one leaf per path, got several of {max(paths, key=paths.count)!r}.")

    flat, tree = jax.tree.flatten((params, args, kwargs))
    positions = [position for position, leaf in enumerate(flat) if _is_array(leaf)]

    def traced(arrays: list[Any]) -> Any:
        filled = list(flat)
        for position, array in zip(positions, arrays, strict=True):
            filled[position] = array
        params, args, kwargs = jax.tree.unflatten(tree, filled)
        return [leaf for leaf in jax.tree.leaves(apply_fn(params, *args, **kwargs)) if _is_array(leaf)]

    jaxpr = jax.make_jaxpr(traced)([flat[position] for position in positions])
    contracted: dict[str, Axes] = {}
    stacked: dict[str, Axes] = {}
    skipped: dict[str, str] = {}
    tied: dict[str, Axes] = {}
    for (path, leaf), uses in zip(leaves, find_uses(jaxpr, list(shapes.values())), strict=True):
        products, reason = _judge(leaf, uses)
        if reason is not None:
            skipped[path] = reason
        if products and all(use in products or use.what == LOOKUP for use in uses):
            (contracted if reason is None else tied)[path] = _sorted(products[0].contracted)
            stacked[path] = _sorted(frozenset.intersection(*(use.stacked for use in products)))
    return Plan(contracted, stacked, skipped, tied, shapes)


def _is_array(leaf: Any) -> bool:
    # NumPy's scalar types, which say "this dtype", have both attributes too.
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, type)


def _judge(leaf: Any, uses: list[Use]) -> tuple[list[Use], str | None]:
    """The products that a leaf is the weight of, and the reason why it isn't a projection if it isn't one."""
    products = [use for use in uses if use.contracted is not None]
    agree = len({use.contracted for use in products}) == 1
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return [], f"not floating point ({leaf.dtype})"
    if not uses:
        return [], "not used"
    if products and not agree:
        return [], "contracted over different axes in two places"
    whats = list(dict.fromkeys(use.what for use in uses))
    if not products and all(what.startswith("elementwise") for what in whats):
        return [], "; ".join(whats)
    if len(whats) > 1:
        return products, f"used in {'two' if len(whats) == 2 else len(whats)} ways: {'; '.join(whats)}"
    return products, None if products else whats[0]


def _sorted(axes: Any) -> Axes:
    return tuple(sorted(axes))


def _checked_axes(path: str, shape: Axes, axes: Sequence[int]) -> Axes:
    rank = len(shape)
    if any(not -rank <= axis < rank for axis in axes):
        raise ValueError(f"Expected axes of {path!r} with shape {shape}, got {tuple(axes)}.")
    checked = {axis % rank for axis in axes}
    if not 0 < len(checked) < rank:
        raise ValueError(f"Expected some but not all axes of {path!r} with shape {shape}, got {tuple(axes)}.")
    return _sorted(checked)


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
