import math

import numpy as np
import pytest

from jint8._tracing.views import View


def factorizations(size, rng):
    """A random shape of `size` entries."""
    shape = []
    while size > 1:
        factor = int(rng.choice([d for d in range(2, size + 1) if size % d == 0]))
        shape.append(factor)
        size //= factor
    shape = [int(factor) for factor in rng.permutation(shape)]
    shape.insert(rng.integers(len(shape) + 1), 1)
    return tuple(shape)


def moves_along(coordinates, position):
    """The parameter's axes whose coordinate isn't constant along one axis of the view."""
    first = np.take(coordinates, [0], axis=position + 1)
    return {axis for axis, moved in enumerate(coordinates != first) if moved.any()}


@pytest.mark.parametrize("seed", range(200))
def test_random_rearrangements_never_hide_an_axis(seed):
    rng = np.random.default_rng(seed)
    shape = [(4, 6, 5), (6, 4), (2, 3, 4, 2), (12,)][seed % 4]
    view = View.of_leaf(0, shape)
    coordinates = np.indices(shape)
    for _ in range(4):
        sizes = coordinates.shape[1:]
        match rng.integers(4):
            case 0:
                order = [int(position) for position in rng.permutation(len(sizes))]
                view = view.permuted(order)
                coordinates = coordinates.transpose(0, *(position + 1 for position in order))
            case 1 | 2:
                after = factorizations(math.prod(sizes), rng)
                view = view.reshaped(sizes, after)
                coordinates = coordinates.reshape(-1, *after)
            case 3 if sizes:
                position = int(rng.integers(len(sizes)))
                view = view.indexed([position])
                coordinates = coordinates.take(0, axis=position + 1)
        assert len(view.axes) == coordinates.ndim - 1
        for position, axes in enumerate(view.axes):
            assert moves_along(coordinates, position) <= set(axes)


# shape of the parameter, shape after each step, expected axes
EXACT = {
    "merge": ((4, 6), [(24,)], ((0, 1),)),
    "merge and split": ((4, 6), [(24,), (4, 6)], ((0,), (1,))),
    "merge and split otherwise": ((2, 3, 4), [(6, 4), (2, 12)], ((0,), (1, 2))),
    "split": ((4, 6), [(4, 2, 3)], ((0,), (1,), (1,))),
    "split and merge": ((4, 6), [(4, 2, 3), (4, 6)], ((0,), (1,))),
    "new axes of size 1": ((4, 6), [(1, 4, 1, 6, 1)], ((), (0,), (), (1,), ())),
    "size 1 goes": ((4, 1, 6), [(4, 6)], ((0,), (2,))),
    "mixed": ((4, 6), [(3, 8)], ((0, 1), (0, 1))),
    "partly mixed": ((4, 6, 5), [(3, 8, 5)], ((0, 1), (0, 1), (2,))),
    "scalar": ((1, 1), [()], ()),
    "no entries": ((0, 6), [(3, 0)], ((0, 1), (0, 1))),
}


@pytest.mark.parametrize("case", EXACT)
def test_reshapes(case):
    shape, steps, expected = EXACT[case]
    view = View.of_leaf(0, shape)
    for before, after in zip([shape, *steps], steps, strict=False):
        view = view.reshaped(before, after)
    assert view.axes == expected
    assert view.stacked == frozenset()


def test_a_slice_of_one_entry_that_a_reshape_drops_is_stacked():
    assert View.of_leaf(0, (5, 4)).reshaped((1, 4), (4,)).stacked == {0}


def test_permuted_parts_are_not_taken_for_whole_axes():
    view = View.of_leaf(0, (4, 6)).reshaped((4, 6), (2, 2, 6)).permuted((0, 2, 1)).reshaped((2, 6, 2), (24,))
    assert all(set(axes) == {0, 1} for axes in view.reshaped((24,), (4, 6)).axes)
