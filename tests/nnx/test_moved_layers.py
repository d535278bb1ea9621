"""Layers stacked on axis 1 by a model's code, which splits by `nnx.Param`, moves each leaf and scans, as MaxText does.

The model here is written after what MaxText's public source does (`layers/nnx_scan.py`, `layers/nnx_wrappers.py`), for
machines without MaxText; tests/nnx/test_maxtext.py runs MaxText itself.
"""

from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from marks import slow_but

import jint8

LAYERS, WIDTH, HEADS = 3, 32, 4
X = cases.normal(2, 5, WIDTH, seed=1)


class General(nnx.Module):
    """A dense layer whose kernel has several axes, with the names of its axes as metadata."""

    def __init__(self, inputs, outputs, names, rngs):
        fan_in = int(np.prod(inputs))
        self.kernel = nnx.Param(
            jax.random.normal(rngs.params(), (*inputs, *outputs)) / fan_in**0.5,
            out_sharding=names,
            eager_sharding=False,
        )
        self.inputs = inputs

    def __call__(self, x):
        n = len(self.inputs)
        axes = tuple(range(x.ndim - n, x.ndim)), tuple(range(n))
        return jax.lax.dot_general(x, jnp.asarray(self.kernel.get_value(), x.dtype), (axes, ((), ())))


class Block(nnx.Module):
    """Heads and back, a gated pair, and a state of its own."""

    def __init__(self, rngs):
        self.scale = nnx.Param(jnp.ones(WIDTH), out_sharding=("norm",), eager_sharding=False)
        self.heads = General((WIDTH,), (HEADS, 8), ("embed", "heads", "kv"), rngs)
        self.out = General((HEADS, 8), (WIDTH,), ("heads", "kv", "embed"), rngs)
        self.up, self.down = (
            General((WIDTH,), (64,), ("embed", "mlp"), rngs),
            General((64,), (WIDTH,), ("mlp", "embed"), rngs),
        )
        self.last = nnx.Cache(jnp.zeros((2, WIDTH)), out_sharding=("batch", "embed"), eager_sharding=False)

    def __call__(self, x):
        y = x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * self.scale.get_value()
        x = x + self.out(jnp.tanh(self.heads(y)))
        self.last.set_value(x[:, -1])
        return x + self.down(jax.nn.silu(self.up(x)))


class Stack(nnx.Module):
    """Three blocks, stacked on axis 1 of every parameter that has one, as MaxText's `param_scan_axis=1` does it."""

    def __init__(self, *, rngs, remat=True):
        self.remat = remat
        keys = jax.random.split(rngs.params(), LAYERS)

        def make(_, key):
            _, params, rest = nnx.split(Block(nnx.Rngs(params=key)), nnx.Param, ...)
            return None, (params, rest)

        graphdef, _, _ = nnx.split(Block(nnx.Rngs(params=keys[0])), nnx.Param, ...)
        _, (params, rest) = jax.lax.scan(make, None, keys)
        params = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1) if x.ndim > 1 else x, params)
        self.layers = nnx.merge(graphdef, _named(params, 1), _named(rest, 0))
        self.logits_dense = General((WIDTH,), (16,), ("embed", "vocab"), rngs)

    def __call__(self, x):
        graphdef, params, rest = nnx.split(self.layers, nnx.Param, ...)
        params = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), params)

        def layer(x, state):
            block = nnx.merge(graphdef, *state)
            x = block(x)
            return x, nnx.split(block, nnx.Param, ...)[2]

        x, rest = jax.lax.scan(jax.checkpoint(layer) if self.remat else layer, x, (params, rest))
        nnx.update(self.layers, rest)
        return self.logits_dense(x)


def _named(state, axis):
    """The state, with a name for the axis of the layers in its metadata."""

    def leaf(variable):
        names = list(variable.get_metadata()["out_sharding"])
        names.insert(axis, "layers")
        return variable.replace(out_sharding=tuple(names), param_scan_axis=axis)

    return jax.tree.map(leaf, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


class ToLinen(nn.Module):
    """Runs a model of nnx, as MaxText's own `ToLinen` does, which isn't that of Flax; its parameters are boxed."""

    nnx_class: Any
    kwargs: Any = nn.FrozenDict()

    @nn.compact
    def __call__(self, *args):
        model = self.nnx_class(
            **self.kwargs, rngs=nnx.Rngs(params=self.make_rng("params") if self.is_initializing() else 0)
        )
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        if self.is_initializing():
            for name, value in nnx.to_pure_dict(jax.tree.map(_boxed, params, is_leaf=_is_variable)).items():
                self.put_variable("params", name, value)
        else:
            unboxed = nn.meta.unbox(self.variables["params"])
            nnx.replace_by_pure_dict(params, nn.FrozenDict(unboxed).unfreeze())
        return nnx.merge(graphdef, params, rest)(*args)


def _is_variable(x):
    return isinstance(x, nnx.Variable)


def _boxed(variable):
    return nn.LogicallyPartitioned(variable.get_value(), variable.get_metadata()["out_sharding"])


def as_function(model):
    """The model as a function of its parameters, its caches and an input: results and the new caches."""
    graphdef, params, cache = nnx.split(model, nnx.Param, ...)

    def run(params, cache, x):
        merged = nnx.merge(graphdef, params, cache, copy=True)
        return merged(x), nnx.state(merged, nnx.Cache)

    return run, params, cache


def layer_by_layer(params, x):
    """In float64, of the weights that int8 ones stand for, one layer after the other: logits and each one's cache."""
    of = lambda value: np.asarray(value.dequantize() if isinstance(value, jint8.QTensor) else value, np.float64)
    params = jax.tree.map(of, nnx.to_pure_dict(params), is_leaf=lambda leaf: isinstance(leaf, jint8.QTensor))
    x, caches = np.asarray(x, np.float64), []
    for i in range(LAYERS):
        w = jax.tree.map(lambda leaf: leaf[:, i], params["layers"])  # noqa: B023
        y = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * w["scale"]
        heads = np.tanh(np.einsum("btd,dnh->btnh", y, w["heads"]["kernel"]))
        x = x + np.einsum("btnh,nhd->btd", heads, w["out"]["kernel"])
        caches.append(x[:, -1])
        up = x @ w["up"]["kernel"]
        x = x + (up / (1 + np.exp(-up))) @ w["down"]["kernel"]
    return x @ params["logits_dense"]["kernel"], np.stack(caches)


# name: whether each layer is in jax.checkpoint, scheme, largest error
KINDS = {
    "checkpoint": (True, "llm.int8", 0.015),
    "plain": (False, "llm.int8", 0.015),
    "a scale per tensor": (True, "absmax", 0.05),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", slow_but(KINDS, "checkpoint"))
def test_as_a_function_of_its_state(kind):
    remat, scheme, largest = KINDS[kind]
    run, params, cache = as_function(Stack(rngs=nnx.Rngs(0), remat=remat))
    plan = jint8.plan(run, params, cache, X)
    assert {path: plan.stacked[path] for path in plan} == {
        "layers/heads/kernel": (1,),
        "layers/out/kernel": (1,),
        "layers/up/kernel": (1,),
        "layers/down/kernel": (1,),
        "logits_dense/kernel": (),
    }
    config = jint8.Config(scheme=scheme)
    int8 = jint8.quantize_params(params, plan=plan, config=config, include="logits_dense")
    kernels = {path[-2]: leaf.get_value() for path, leaf in nnx.to_flat_state(int8) if path[-1] == "kernel"}
    scales = np.moveaxis(np.asarray(kernels["heads"].scale), 1, 0).reshape(LAYERS, -1)
    assert [len(set(layer)) for layer in scales] == [1 if scheme == "absmax" else HEADS * 8] * LAYERS
    assert len({tuple(layer) for layer in scales}) == LAYERS  # each layer has its own
    logits, new = cases.jit(jint8.apply(run))(int8, cache, X)
    assert cases.count_int8_products(jint8.apply(run), int8, cache, X) >= 5
    want, caches = layer_by_layer(int8, X)
    assert cases.relative_error(logits, want) < largest
    assert cases.relative_error(new["layers"]["last"].get_value(), caches) < largest


def test_metadata_is_that_of_the_float_weights():
    run, params, cache = as_function(Stack(rngs=nnx.Rngs(0)))
    int8 = jint8.quantize_params(params, plan=jint8.plan(run, params, cache, X))
    for path, leaf in nnx.to_flat_state(int8):
        assert leaf.get_metadata() == dict(nnx.to_flat_state(params))[path].get_metadata()


def test_the_module_itself_is_refused_with_the_way_out():
    model = Stack(rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"splits the state of stacked layers by nnx.Param.*jint8.apply"):
        jint8.nnx.quantize(model, X)


def test_in_a_linen_module_that_is_not_that_of_flax():
    module = ToLinen(Stack)
    variables = module.init(jax.random.key(0), X)
    assert isinstance(variables["params"]["layers"]["up"]["kernel"], nn.LogicallyPartitioned)
    plan = jint8.plan(module.apply, variables, X)
    assert plan.stacked["layers/up/kernel"] == (1,)
    int8 = jint8.quantize_params(variables, plan=plan, include="logits_dense")
    run = jint8.apply(module.apply)
    assert cases.count_int8_products(run, int8, X) >= 5
    assert cases.relative_error(cases.jit(run)(int8, X), module.apply(variables, X)) < 0.03
