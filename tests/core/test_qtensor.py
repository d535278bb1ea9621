"""`QTensor` as a value, as a pytree, and stored in other orders."""

import copy
import dataclasses
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jint8
from jint8._core.qtensor import contract_last


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


AFFINE = jint8.Config(scheme="llm.int8-zp")


@pytest.mark.parametrize("scheme", [s for s in oracle.SCHEMES if s != "none"])
def test_leaves_start_with_q_and_share_its_rank(scheme):
    w = jint8.quantize(normal(4, 5, 6), contract_axes=(0, 1), config=jint8.Config(scheme=scheme))
    leaves = jax.tree.leaves(w)
    assert leaves[0] is w.q
    assert {leaf.ndim for leaf in leaves} == {3}
    assert len(leaves) == 2 + jint8.SCHEMES[scheme].affine
    assert w.nbytes == sum(leaf.nbytes for leaf in leaves)
    assert (w.shape, w.ndim, w.size, w.config.scheme) == ((4, 5, 6), 3, 120, scheme)


def test_key_paths_name_the_leaves():
    tree = {"dense": jint8.quantize(normal(4, 5), config=AFFINE)}
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    assert names == ["['dense'].q", "['dense'].scale", "['dense'].zero"]


@pytest.mark.parametrize(
    "leaf",
    [None, "name", object(), 3.5, jax.ShapeDtypeStruct((2,), jnp.int8), jax.sharding.PartitionSpec("x"), (1, 2)],
    ids=lambda leaf: type(leaf).__name__,
)
def test_any_leaf_may_be_put_in(leaf):
    w = jint8.quantize(normal(4, 5), config=AFFINE)
    odd = jax.tree.map(lambda _: leaf, w)
    assert odd.q is leaf
    assert "QTensor" in repr(odd)
    assert jax.tree.unflatten(jax.tree.structure(w), [leaf] * 3).config == AFFINE


def test_map_keeps_the_static_fields():
    w = contract_last(jint8.quantize(normal(4, 5), config=AFFINE), (0,))
    doubled = jax.tree.map(lambda a: 2 * a, w)
    assert (doubled.config, doubled.order, doubled.dtype) == (w.config, w.order, w.dtype)


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))])
def test_clones_are_equal(clone):
    w = contract_last(jint8.quantize(normal(3, 4, 5), contract_axes=(1,), config=AFFINE), (1,), (0,))
    other = clone(w)
    assert jax.tree.structure(other) == jax.tree.structure(w)
    assert all(map(np.array_equal, jax.tree.leaves(other), jax.tree.leaves(w)))


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        jint8.quantize(normal(2, 2)).q = None


@pytest.mark.first_case
@pytest.mark.parametrize(
    ("shape", "axes", "stack"),
    [
        ((4, 5), (0,), ()),
        ((4, 5), (1,), ()),
        ((4, 5, 6), (0, 1), ()),
        ((4, 5, 6), (0, 2), ()),
        ((4, 5, 6), (1,), ()),
        ((3, 4, 5), (1,), (0,)),
        ((4, 3, 5), (0,), (1,)),
        ((3, 2, 4, 5), (2,), (0, 1)),
        ((4, 3, 5, 6), (0, 2), (1,)),
        ((1, 1, 1), (0,), (1,)),
    ],
    ids=str,
)
def test_contract_last_keeps_what_it_stands_for(shape, axes, stack):
    w = jint8.quantize(normal(*shape), contract_axes=axes, stack_axes=stack, config=AFFINE)
    moved = contract_last(w, axes, stack)
    own = [size for a, size in enumerate(shape) if a not in axes and a not in stack]
    contracted = [shape[a] for a in axes]
    assert [s for a, s in enumerate(moved.q.shape) if a not in stack] == own + contracted
    assert (moved.shape, moved.nbytes, moved.dtype) == (shape, w.nbytes, w.dtype)
    np.testing.assert_array_equal(moved.dequantize(), w.dequantize())


@pytest.mark.parametrize("layer_axis", [0, 1])
def test_a_layer_that_is_sliced_out_has_its_own_shape(layer_axis):
    shape = [4, 5]
    shape.insert(layer_axis, 3)
    axes = (1 - layer_axis,)  # the axis of size 4
    w = jint8.quantize(normal(*shape), contract_axes=axes, stack_axes=(layer_axis,))
    w = contract_last(w, axes, (layer_axis,))
    expected = np.moveaxis(np.asarray(w.dequantize()), layer_axis, 0)

    def of_a_layer(layer):
        assert (layer.shape, layer.q.shape) == ((4, 5), (5, 4))
        return layer.dequantize()

    np.testing.assert_array_equal(jax.vmap(of_a_layer, in_axes=layer_axis)(w), expected)
    np.testing.assert_array_equal(of_a_layer(jax.tree.map(lambda a: jnp.take(a, 1, layer_axis), w)), expected[1])
    if layer_axis == 0:
        np.testing.assert_array_equal(jax.lax.map(of_a_layer, w), expected)


TWO_OF_FOUR = [
    pytest.param(stack, sliced, id=f"{stack} without {stack[sliced]}")
    for stack in itertools.combinations(range(4), 2)
    for sliced in (0, 1)
]


@pytest.mark.first_case
@pytest.mark.parametrize(("stack", "sliced"), TWO_OF_FOUR)
def test_one_of_two_stack_axes_that_is_sliced_away(stack, sliced):
    """Wherever the two lie, contracted axis 4 and channels 5 of one scanned or vmapped weight are told apart."""
    shape, own = [0] * 4, [axis for axis in range(4) if axis not in stack]
    for axis, size in zip((*stack, *own), (3, 2, 4, 5), strict=True):
        shape[axis] = size
    w = contract_last(jint8.quantize(normal(*shape), contract_axes=own[0], stack_axes=stack), own[:1], stack)
    assert w.shape == tuple(shape)
    whole = np.asarray(w.dequantize())
    once = jax.tree.map(lambda leaf: jnp.take(leaf, 1, stack[sliced]), w)
    np.testing.assert_array_equal(once.dequantize(), np.take(whole, 1, stack[sliced]))
    rest = stack[1 - sliced] - (sliced == 0)
    twice = jax.tree.map(lambda leaf: jnp.take(leaf, 1, rest), once)
    np.testing.assert_array_equal(twice.dequantize(), np.take(np.take(whole, 1, stack[sliced]), 1, rest))


@pytest.mark.parametrize("last", [True, False], ids=["contracted last", "order kept"])
def test_transposed(last):
    w = jint8.quantize(normal(3, 4, 5), contract_axes=(1,), config=AFFINE)
    w = contract_last(w, (1,), (0,)) if last else w
    assert w.T.shape == (5, 4, 3)
    assert w.T.q is w.q
    np.testing.assert_array_equal(w.T.dequantize(), np.asarray(w.dequantize()).T)
    x = normal(6, 4)
    got, want = (jint8.einsum("bk,nkl->bnl", x, v) for v in (w.T, jint8.quantize(w.dequantize().T, contract_axes=(1,))))
    np.testing.assert_allclose(got, want, atol=0.05)


def test_leading_axes_need_not_be_named_as_stacked():
    w = contract_last(jint8.quantize(normal(3, 4, 5), contract_axes=(1,)), (1,))
    assert jax.tree.map(lambda leaf: leaf[0], w).shape == (4, 5)


def weights_and_slices():
    """Every choice of stacked and contracted axes of three or four, of sizes that tell nothing (cubes, ones)."""
    for size in (1, 3):
        for ndim in (3, 4):
            for stacked in itertools.chain.from_iterable(itertools.combinations(range(ndim), n) for n in (1, 2)):
                own = [axis for axis in range(ndim) if axis not in stacked]
                for n in range(1, len(own)):
                    for contracted in itertools.combinations(own, n):
                        yield (size,) * ndim, contracted, stacked
    yield from (((4, 2, 3, 1), (0,), (1, 3)), ((2, 1, 2, 3), (1, 3), (0,)), ((1, 3, 1, 2), (1,), (2,)))


@pytest.mark.slow
def test_any_stacked_axis_may_be_sliced_away():
    """Slices stand for slices of the floats, for every position of the axes; nothing is guessed from sizes."""
    for shape, contracted, stacked in weights_and_slices():
        q = jnp.asarray(100 * normal(*shape), jnp.int8)
        scale = normal(*(1 if axis in contracted else size for axis, size in enumerate(shape)))
        w = contract_last(jint8.QTensor(q, jnp.asarray(scale)), contracted, stacked)
        whole = np.asarray(w.dequantize())
        for axis in stacked:
            layer = jax.tree.map(lambda leaf, axis=axis: jnp.take(leaf, 0, axis), w)
            np.testing.assert_array_equal(layer.dequantize(), np.take(whole, 0, axis), err_msg=f"{shape} {stacked}")


def test_one_stacked_axis_is_stored_with_contracted_axes_last_wherever_it_is():
    for axis in range(4):
        own = [a for a in range(4) if a != axis]
        for contracted in own:
            shape = [1 if a == contracted else 3 for a in range(4)]
            w = contract_last(jint8.QTensor(jnp.ones((3,) * 4, jnp.int8), jnp.ones(shape)), [contracted], [axis])
            assert [w.scale.shape[a] for a in own][-1] == 1


def test_a_slice_of_which_nothing_tells_what_is_gone_is_refused():
    """0.1.0 stored such weights, and took a guess."""
    w = jint8.QTensor(jnp.ones((2, 2, 2, 2), jnp.int8), jnp.ones((2, 2, 2, 1)), order=(1, 0), stack=(0, 1))
    assert w.shape == (2, 2, 2, 2)
    with pytest.raises(
        ValueError, match="Expected a slice of an int8 weight that shows which stacked axis it has lost"
    ):
        jax.tree.map(lambda leaf: leaf[0], w).shape  # noqa: B018


def test_layers_that_are_stacked_keep_their_order():
    layers = [contract_last(jint8.quantize(normal(4, 5) + i), (0,)) for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    assert stacked.shape == (3, 4, 5)
    np.testing.assert_array_equal(stacked.dequantize()[2], layers[2].dequantize())
