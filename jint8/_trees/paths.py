"""Names of leaves, and patterns over them.

A leaf of a parameter tree is named by its keys joined with ``/``: ``"layers/0/attn/kernel"``. Every part of the
library that names a leaf (plans, skip lists, error messages, checkpoints) uses these names.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import jax
from jax.tree_util import GetAttrKey, keystr

__all__ = ["Patterns", "Selection", "leaf_paths", "matches", "nested", "path_group", "path_string"]

Patterns = str | Iterable[str] | Callable[[str], bool]


def path_string(key_path: Sequence[Any]) -> str:
    """Joins a JAX key path into the name of a leaf.

    A leading ``params`` is dropped, so that ``variables`` and ``variables["params"]`` give the same names. A trailing
    attribute ``value`` is dropped: it belongs to the box (``nn.Partitioned``, ``nnx.Variable``) around the array. A
    dictionary key ``"value"`` is kept, since attention layers have one.

    Args:
      key_path: the first element of a pair from `jax.tree_util.tree_leaves_with_path`.

    Returns:
      The name; ``""`` for a tree that is itself a leaf.

    Examples:
      >>> from jax.tree_util import DictKey, GetAttrKey, SequenceKey
      >>> path_string((DictKey("params"), DictKey("layers"), SequenceKey(0), DictKey("kernel"), GetAttrKey("value")))
      'layers/0/kernel'
    """
    keys = tuple(key_path)
    if len(keys) > 1 and keystr(keys[:1], simple=True) == "params":
        keys = keys[1:]
    if keys and keys[-1] == GetAttrKey("value"):
        keys = keys[:-1]
    return keystr(keys, simple=True, separator="/")


def leaf_paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[str, Any]]:
    """Lists the leaves of a tree with their names, in the order of `jax.tree.leaves`.

    Args:
      tree: any pytree.
      is_leaf: as in `jax.tree.leaves`; give it to stop at a node such as a `jint8.QTensor`.

    Returns:
      Pairs of name and leaf.

    Examples:
      >>> leaf_paths({"params": {"dense": {"bias": 1, "kernel": 2}}})
      [('dense/bias', 1), ('dense/kernel', 2)]
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return [(path_string(key_path), leaf) for key_path, leaf in leaves]


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of dictionaries that has these leaves: the inverse of `leaf_paths`.

    Examples:
      >>> nested({"dense/bias": 1, "dense/kernel": 2})
      {'dense': {'bias': 1, 'kernel': 2}}
    """
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def matches(path: str, patterns: Patterns) -> bool:
    """Whether a leaf's name matches any of some patterns.

    A pattern matches when it equals, in the sense of `fnmatch`, any run of consecutive whole segments of the path. So
    ``"lm_head"`` matches ``"model/lm_head/kernel"`` but not ``"model/lm_head_norm/scale"``; ``"mlp/up"`` matches
    ``"layers/0/mlp/up/kernel"``; ``"layers_*"`` matches everything under ``layers_0``. As in `fnmatch`, ``*`` also
    stands for ``/``, and case matters.

    Args:
      path: the name of a leaf, as from `path_string`.
      patterns: a pattern, an iterable of patterns, or a predicate that takes the path.

    Returns:
      True if any pattern matches; False for no patterns.

    Raises:
      TypeError: if `patterns` is none of these.

    Examples:
      >>> matches("model/lm_head/kernel", "lm_head")
      True
      >>> matches("layers/10/mlp/kernel", ["layers/1", "attn"])
      False
      >>> matches("layers/1/mlp/kernel", lambda path: path.startswith("layers/"))
      True
    """
    if callable(patterns):
        return bool(patterns(path))
    _check_patterns(patterns)
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"Expected path patterns to be strings, got {pattern!r}.")
    segments = path.split("/")
    ends = range(len(segments) + 1)
    runs = ["/".join(segments[start:stop]) for start in ends for stop in ends[start + 1 :]]
    return any(fnmatchcase(run, pattern) for pattern in patterns for run in runs)


@dataclass(frozen=True)
class Selection:
    """Which weights a caller wants in floating point, and which in int8 whatever else says no.

    Attributes:
      skip: patterns, or a predicate, of weights that stay in floating point.
      include: patterns, or a predicate, that win over `skip` and over every default.
    """

    skip: Patterns = ()
    include: Patterns = ()

    def __post_init__(self):
        # An iterator would be used up by the first weight that is looked up; with tuples, equality means the same.
        object.__setattr__(self, "skip", _predicate_or_tuple(self.skip))
        object.__setattr__(self, "include", _predicate_or_tuple(self.include))

    def includes(self, *names: str) -> bool:
        """Whether `include` matches any of the names that a weight is known by."""
        return any(matches(name, self.include) for name in names)

    def skips(self, *names: str, default: Patterns = ()) -> bool:
        """Whether `skip`, or the patterns that are left out by default, match any name, and `include` matches none."""
        skipped = any(matches(name, self.skip) or matches(name, default) for name in names)
        return skipped and not self.includes(*names)


def path_group(path: str) -> str:
    """The name that leaves share which differ only in a layer's number.

    Args:
      path: the name of a leaf.

    Returns:
      The path with numbers, alone or behind an underscore, as `*`.

    Examples:
      >>> path_group("layers_10/mlp/kernel"), path_group("layers/3/up_2/kernel")
      ('layers_*/mlp/kernel', 'layers/*/up_*/kernel')
    """
    return "/".join(re.sub(r"(^|_)\d+$", r"\1*", segment) for segment in path.split("/"))


def _predicate_or_tuple(patterns: Patterns) -> Patterns:
    if isinstance(patterns, str):
        return (patterns,)
    if callable(patterns):
        return patterns
    _check_patterns(patterns)
    return tuple(patterns)


def _check_patterns(patterns: Any) -> None:
    if isinstance(patterns, Mapping) or not isinstance(patterns, Iterable):
        raise TypeError(f"Expected a path pattern, an iterable of them or a predicate, got {patterns!r}.")
