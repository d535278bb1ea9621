"""What the Variables of an int8 model keep of those of the float model: sharing, metadata, plain arrays, filters."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import jint8
from jint8.nnx import Quantized

X = cases.normal(2, 32, seed=1)
EXACT = jint8.Config(threshold=0.0)


def random(rngs, *shape):
    return jax.random.normal(rngs.params(), shape) / 6


def paths(model, *filters):
    return ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, *filters))]


# Shared parameters


class Shared(nnx.Module):
    """Two layers of one kernel, with a bias each. The first in the state is the second that is made."""

    def __init__(self, rngs, make=lambda rngs: nnx.Linear(32, 32, rngs=rngs)):
        self.second, self.first = make(rngs), make(rngs)
        self.second.kernel = self.first.kernel

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


class Own(nnx.Module):
    def __init__(self, rngs):
        self.kernel = nnx.Param(random(rngs, 32, 32))

    def __call__(self, x):
        return x @ self.kernel[...]


class Mixed(nnx.Module):
    """A layer that a converter knows, and one that none does, of one kernel."""

    def __init__(self, rngs, transposed=False):
        self.own, self.linear, self.transposed = Own(rngs), nnx.Linear(32, 32, rngs=rngs), transposed
        self.own.kernel = self.linear.kernel

    def __call__(self, x):
        y = jnp.tanh(self.linear(x))
        return y @ self.own.kernel[...].T if self.transposed else self.own(y)


# name: model, arguments of quantize
SHARED = {
    "by converters": (Shared, ()),
    "by converters, traced": (Shared, (X,)),
    "by own code": (lambda rngs: Shared(rngs, Own), (X,)),
    "by a converter and own code": (Mixed, (X,)),
}


@pytest.mark.parametrize("name", SHARED)
def test_a_shared_parameter_stays_shared(name):
    make, inputs = SHARED[name]
    model = make(nnx.Rngs(0))
    int8 = jint8.nnx.quantize(model, *inputs, config=EXACT)
    assert len(paths(int8, Quantized)) == 1
    assert len(paths(model, lambda path, _: path[-1] == "kernel")) == 1
    merged = nnx.merge(*nnx.split(int8))
    for each in (int8, merged):
        assert cases.relative_error(each(X), model(X)) < 0.03
    graphdef, state = nnx.split(int8)
    assert cases.count_int8_products(lambda state, x: nnx.merge(graphdef, state)(x), state, X) == 2


def test_a_shared_parameter_is_known_by_all_its_names():
    model = Shared(nnx.Rngs(0))
    assert paths(jint8.nnx.quantize(model, skip="second"), Quantized) == []
    assert paths(jint8.nnx.quantize(model, skip="first"), Quantized) == []
    found = jint8.nnx.calibrate(model, [X], budget=1)
    assert list(found) == ["first/kernel"]
    int8 = jint8.nnx.quantize(model, outliers=found, config=jint8.Config(outliers="static"))
    assert int8.second.kernel.get_value().outlier_rows.shape == (32, 1)


def test_a_parameter_shared_over_other_axes_stays_in_floating_point():
    """Else each place would have a copy, and an update of one would leave the others as they were."""
    why = "linear/kernel: it is own/kernel too, and not known to be contracted over the same axes there"
    with pytest.warns(UserWarning, match=why):
        int8 = jint8.nnx.quantize(Mixed(nnx.Rngs(0)))
    assert int8.linear.kernel is int8.own.kernel
    transposed = Mixed(nnx.Rngs(0), transposed=True)
    with pytest.warns(UserWarning, match="kernel: contracted over different axes in two places"):
        int8 = jint8.nnx.quantize(transposed, X)
    assert int8.linear.kernel is int8.own.kernel
    assert jnp.array_equal(int8(X), transposed(X))


# Metadata


def partitioned(*names, **metadata):
    return nnx.with_metadata(nnx.initializers.lecun_normal(), out_sharding=names, eager_sharding=False, **metadata)


class Partitioned(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(32, 64, kernel_init=partitioned("data", "model", role="up"), rngs=rngs)
        self.own = Own(rngs)
        self.own.kernel = nnx.Param(random(rngs, 64, 32), out_sharding=("model", None), eager_sharding=False)

    def __call__(self, x):
        assert self.own.kernel.get_metadata("out_sharding") == ("model", None)
        return self.own(self.up(x))


def test_metadata_is_kept():
    model = Partitioned(nnx.Rngs(0))
    int8 = jint8.nnx.quantize(model, X)
    specs = [nnx.get_partition_spec(nnx.state(m)) for m in (model, int8)]
    for spec in specs:
        assert spec["up"]["kernel"].get_value() == PartitionSpec("data", "model")
        assert spec["own"]["kernel"].get_value() == PartitionSpec("model", None)
    assert int8.up.kernel.get_metadata("role") == "up"
    assert "stands_for" not in int8.up.kernel.get_metadata()
    assert nnx.merge(*nnx.split(int8)).up.kernel.get_metadata("role") == "up"
    assert cases.relative_error(int8(X), model(X)) < 0.03


def test_specs_of_the_int8_state_place_it():
    """They are those of the float weights, which `jint8.shardings` carries over to how int8 values are stored."""
    mesh = jax.make_mesh((1, 1), ("data", "model"))
    int8 = jint8.nnx.quantize(Partitioned(nnx.Rngs(0)), X)
    state = nnx.state(int8)
    placed = jint8.shardings(state, nnx.get_partition_spec(state), mesh=mesh)
    kernel = placed["up"]["kernel"].get_value()
    assert tuple(kernel.q.spec) == ("model", "data")  # stored with the contracted axis last
    assert tuple(kernel.scale.spec) == ("model", None)
    nnx.update(int8, jax.device_put(state, placed))
    assert isinstance(int8.up.kernel.get_value().q.sharding, NamedSharding)


def test_the_name_of_a_stacked_axis_comes_and_goes():
    """As in nnx, `transform_metadata` names the axis of layers, which scan takes out of what a layer sees."""
    layers = {nnx.PARTITION_NAME: "layers"}
    make = lambda key: nnx.Linear(32, 32, kernel_init=partitioned("data", "model"), rngs=nnx.Rngs(key))
    stacked = nnx.vmap(make, out_axes=0, transform_metadata=layers)(jax.random.split(jax.random.key(0), 3))
    int8 = jint8.nnx.quantize(stacked)
    assert int8.kernel.get_metadata("out_sharding") == ("layers", "data", "model")
    seen = []

    def forward(layer, x):
        seen.append(layer.kernel.get_metadata("out_sharding"))
        return layer(x)

    scan = nnx.scan(forward, in_axes=(0, nnx.Carry), out_axes=nnx.Carry, transform_metadata=layers)
    got, want = scan(int8, X), scan(stacked, X)
    assert set(seen) == {("data", "model")}
    assert cases.relative_error(got, want) < 0.03


class Weight(nnx.Param):
    """A type of Variable of a user's own."""


def test_own_code_sees_the_type_of_its_variable():
    class Typed(nnx.Module):
        def __init__(self, rngs):
            self.w = Weight(random(rngs, 32, 8), role="output")

        def __call__(self, x):
            assert type(self.w) is Weight
            return x @ self.w[...] * (2.0 if self.w.get_metadata("role") == "output" else 1.0)

    model = Typed(nnx.Rngs(0))
    int8 = jint8.nnx.quantize(model, X, config=EXACT)
    assert type(int8.w) is Quantized
    assert cases.relative_error(int8(X), model(X)) < 0.03


# Plain arrays


class Arrays(nnx.Module):
    """A weight, a mask and a counter that are arrays, not Variables."""

    def __init__(self, rngs):
        self.w = nnx.Param(random(rngs, 32, 16))
        self.plain = random(rngs, 16, 8)
        self.mask = jnp.arange(16.0)
        self.calls = jnp.zeros((), jnp.int32)

    def __call__(self, x):
        self.calls = self.calls + 1
        return (x @ self.w[...] * self.mask) @ self.plain


def test_plain_arrays_beside_and_as_weights():
    model = Arrays(nnx.Rngs(0))
    int8 = jint8.nnx.quantize(model, X, config=EXACT)
    assert paths(int8, Quantized) == ["plain", "w"]
    got, want = int8(X), model(X)
    assert cases.relative_error(got, want) < 0.03
    int8(X)
    assert (int(int8.calls), int(model.calls)) == (2, 1)
    assert isinstance(model.plain, jax.Array)
    graphdef, state = nnx.split(int8)
    y = cases.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, X)
    assert cases.relative_error(y, want) < 0.03


def test_a_plain_array_below_a_layer_of_its_own_is_changed_in_place():
    class Counter(nnx.Module):
        def __init__(self):
            self.calls = jnp.zeros((), jnp.int32)

    class Outer(Own):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.inner = Counter()
            self.listed = nnx.List([jnp.zeros(())])

        def __call__(self, x):
            self.inner.calls = self.inner.calls + 1
            self.listed[0] = self.listed[0] + 2
            return super().__call__(x)

    int8 = jint8.nnx.quantize(Outer(nnx.Rngs(0)), X)
    inner = int8.inner
    int8(X)
    int8(X)
    assert int8.inner is inner
    assert (int(inner.calls), float(int8.listed[0])) == (2, 4.0)


# Filters


def test_filters_for_int8_weights():
    """`nnx.Param` finds what trains; `Quantized` the int8 weights; both together all weights."""
    int8 = jint8.nnx.quantize(nnx.Linear(32, 8, rngs=nnx.Rngs(0)))
    assert paths(int8, nnx.Param) == ["bias"]
    assert paths(int8, Quantized) == ["kernel"]
    assert paths(int8, (nnx.Param, Quantized)) == ["bias", "kernel"]
    with pytest.raises(ValueError, match=r"Non-exhaustive filters|kernel"):
        nnx.split(int8, nnx.Param)


@pytest.mark.slow
def test_an_optimizer_of_params_trains_what_is_in_floating_point():
    int8 = jint8.nnx.quantize(nnx.Linear(32, 8, rngs=nnx.Rngs(0)))
    before = int8.kernel.get_value()
    optimizer = nnx.Optimizer(int8, optax.sgd(0.1), wrt=nnx.Param)
    gradients = nnx.grad(lambda model: (model(X) ** 2).mean())(int8)
    optimizer.update(int8, gradients)
    assert float(jnp.abs(int8.bias[...]).max()) > 0
    np.testing.assert_array_equal(int8.kernel.get_value().q, before.q)
