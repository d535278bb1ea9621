import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import freeze
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from jint8._trees.paths import Selection, leaf_paths, matches, path_string

KEY_PATHS = {
    "leading params": ((DictKey("params"), DictKey("a"), DictKey("kernel")), "a/kernel"),
    "inner params": ((DictKey("a"), DictKey("params"), DictKey("kernel")), "a/params/kernel"),
    "leaf named params": ((DictKey("params"),), "params"),
    "sequence and index": ((SequenceKey(3), FlattenedIndexKey(1)), "3/1"),
    "integer key": ((DictKey("layers"), DictKey(0)), "layers/0"),
    "box": ((GetAttrKey("kernel"), GetAttrKey("value")), "kernel"),
    "dict key value": ((DictKey("attn"), DictKey("value")), "attn/value"),
    "box of an attribute value": ((GetAttrKey("attn"), GetAttrKey("value"), GetAttrKey("value")), "attn/value"),
    "projection called value": (
        (GetAttrKey("attn"), GetAttrKey("value"), GetAttrKey("kernel"), GetAttrKey("value")),
        "attn/value/kernel",
    ),
    "bare leaf": ((), ""),
    "unknown key": (("a", "b"), "a/b"),
}


@pytest.mark.parametrize("case", KEY_PATHS)
def test_path_string(case):
    key_path, expected = KEY_PATHS[case]
    assert path_string(key_path) == expected


def test_linen_boxes_and_frozen_dicts():
    tree = freeze(
        {
            "params": {
                "dense": {
                    "bias": nn.LogicallyPartitioned(jnp.ones(2), ("n",)),
                    "kernel": nn.Partitioned(jnp.ones(2), (None,)),
                }
            }
        }
    )
    assert [path for path, _ in leaf_paths(tree)] == ["dense/bias", "dense/kernel"]


def test_nnx_state_and_pure_dict_agree():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs)])

    state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    names = [path for path, _ in leaf_paths(state)]
    assert names == ["layers/0/bias", "layers/0/kernel"]
    assert [path for path, _ in leaf_paths(nnx.to_pure_dict(state))] == names


def test_leaf_paths_keeps_the_order_of_tree_leaves():
    tree = {"b": [1, 2], "a": (3, {"c": 4})}
    assert [leaf for _, leaf in leaf_paths(tree)] == jax.tree.leaves(tree)


def test_leaf_paths_stops_at_is_leaf():
    tree = {"a": (1, 2), "b": 3}
    assert leaf_paths(tree, is_leaf=lambda node: isinstance(node, tuple)) == [("a", (1, 2)), ("b", 3)]


MATCHES = {
    "segment": ("lm_head", "model/lm_head/kernel", True),
    "part of a segment": ("lm_head", "model/lm_head_norm/scale", False),
    "last segment": ("kernel", "a/b/kernel", True),
    "whole path": ("a/b/kernel", "a/b/kernel", True),
    "directory": ("a/b", "a/b/kernel", True),
    "directory that only looks like it": ("layers/1", "layers/10/kernel", False),
    "trailing": ("b/kernel", "a/b/kernel", True),
    "middle": ("b/c", "a/b/c/kernel", True),
    "wildcard segment": ("layers_*", "model/layers_3/kernel", True),
    "wildcard across segments": ("layers/*/kernel", "layers/0/mlp/kernel", True),
    "wildcard needs a segment": ("*/lm_head/*", "lm_head/kernel", False),
    "question mark": ("layers/?", "layers/12/kernel", False),
    "class": ("layers/[01]", "layers/1/kernel", True),
    "case": ("LM_head", "lm_head/kernel", False),
    "any of several": (("x", "b"), "a/b", True),
    "generator": ((name for name in ("x", "b")), "a/b", True),
    "none": ((), "a/b", False),
    "predicate": (lambda path: path.endswith("b"), "a/b", True),
    "predicate says no": (lambda path: False, "a/b", False),
}


@pytest.mark.parametrize("case", MATCHES)
def test_matches(case):
    patterns, path, expected = MATCHES[case]
    assert matches(path, patterns) is expected


@pytest.mark.parametrize("patterns", [3, None, ["a", 3], b"a"], ids=["int", "none", "int in a list", "bytes"])
def test_matches_rejects(patterns):
    with pytest.raises(TypeError, match="pattern"):
        matches("a/b", patterns)


def test_a_selection_of_an_iterator_is_used_up_by_no_weight():
    selection = Selection(skip=iter(["mlp"]), include=(pattern for pattern in ["up"]))
    assert [selection.skips("mlp/down"), selection.skips("mlp/down"), selection.skips("mlp/up")] == [True, True, False]
    assert selection == Selection(["mlp"], "up")
