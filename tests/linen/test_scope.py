"""What `jint8.linen._scope` uses of Flax that isn't its public interface: these fail where Flax changes it."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jint8.linen import _scope


class Layer(nn.Module):
    def setup(self):
        self.w = self.param("w", lambda _: jnp.ones(2))
        self.others = {"w": [self.w]}

    def __call__(self):
        return self.w, self.others["w"][0], self.get_variable("params", "w")


class Counter(nn.Module):
    @nn.compact
    def __call__(self):
        inner = nn.BatchNorm(use_running_average=False, name="norm")
        inner(jnp.ones((2, 3)))
        self.variable("state", "calls", lambda: jnp.zeros(())).value += 1


VARIABLES = {"params": {"w": jnp.ones(2), "b": jnp.zeros(1)}}


def test_params_are_replaced_and_come_back():
    layer = Layer().bind(VARIABLES)
    new = jnp.full(2, 5.0)
    with _scope.params_replaced(layer.scope, {"w": new}):
        assert layer.get_variable("params", "w") is new
        assert layer.get_variable("params", "b") is VARIABLES["params"]["b"]
    assert layer.get_variable("params", "w") is VARIABLES["params"]["w"]
    assert set(VARIABLES["params"]) == {"w", "b"}


def test_attributes_are_replaced_and_come_back():
    layer = Layer().bind(VARIABLES)
    old, new = layer.w, jnp.full(2, 5.0)
    with pytest.raises(flax.errors.SetAttributeFrozenModuleError):
        layer.w = new  # why it is done around `__setattr__`
    with _scope.attributes_replaced(layer, {id(old): new}):
        assert all(w is new for w in layer()[:2])
    assert all(w is old for w in layer()[:2])


def test_state_is_read_and_written():
    variables = Counter().init(jax.random.key(0))
    counter = Counter().bind(variables, mutable=["state", "batch_stats"])
    counter()
    state = _scope.mutable_state(counter.scope)
    assert set(state) == {"state", "batch_stats"}
    assert state["state"]["calls"] == 2
    other = Counter().bind(variables, mutable=["state", "batch_stats"])
    _scope.write_state(other.scope, state)
    assert other.get_variable("state", "calls") == 2
    np.testing.assert_array_equal(
        other.variables["batch_stats"]["norm"]["mean"], counter.variables["batch_stats"]["norm"]["mean"]
    )
