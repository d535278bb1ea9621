"""`out_sharding=` at the call, on meshes whose axes are explicit."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from virtual_devices import run_on_eight_devices

import jint8


@pytest.fixture(scope="module")
def found():
    return run_on_eight_devices(Path(__file__).with_name("explicit_mesh.py"), optimized=False)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["Layers", "Tied", "Own"])
def test_results_are_divided_as_those_of_the_float_model(found, model):
    for spec, error in found[model]["results"]:
        assert spec == found[model]["float"]
        assert error < 0.03


@pytest.mark.slow
def test_int8_weights_are_divided_as_the_float_ones(found):
    assert found["Layers"]["weights"] == {
        "up/kernel": ["model", "None"],  # stored [n, k]
        "down/kernel": ["None", "model"],
        "lora/kernel": ["None", "None"],
        "einsum/kernel": ["model", "None", "None"],
        "general/kernel": ["model", "None", "None"],
    }
    assert found["Tied"]["weights"] == {"embed/embedding": ["model", "None"], "dense/kernel": ["None", "None"]}


@pytest.mark.slow
def test_gradient(found):
    assert found["gradient"] < 0.12


LAYERS = {
    "Linear": (lambda r: nnx.Linear(64, 32, rngs=r), jnp.ones((2, 64))),
    "LinearGeneral": (lambda r: nnx.LinearGeneral(64, 32, rngs=r), jnp.ones((2, 64))),
    "Einsum": (lambda r: nnx.Einsum("bd,dn->bn", (64, 32), rngs=r), jnp.ones((2, 64))),
    "LoRALinear": (lambda r: nnx.LoRALinear(64, 32, lora_rank=2, rngs=r), jnp.ones((2, 64))),
    "Embed": (lambda r: nnx.Embed(16, 32, rngs=r), jnp.array([3, 5])),
}


@pytest.mark.first_case
@pytest.mark.parametrize("name", LAYERS)
def test_on_one_device(name):
    make, x = LAYERS[name]
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        model = make(nnx.Rngs(0))
        int8 = jint8.nnx.quantize(model, include="embedding")
        spec = PartitionSpec("data", "model")
        got, want = int8(x, out_sharding=spec), model(x, out_sharding=spec)
        assert jax.typeof(got) == jax.typeof(want)
        assert float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)) < 0.02
        with pytest.raises(ValueError, match="rows"):
            int8(x, out_sharding=PartitionSpec("rows"))


def test_attend_on_one_device():
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        int8 = jint8.nnx.quantize(nnx.Embed(16, 32, rngs=nnx.Rngs(0)), include="embedding")
        y = int8.attend(jnp.ones((2, 32)), out_sharding=PartitionSpec("data", "model"))
        assert jax.typeof(y).sharding.spec == PartitionSpec("data", "model")
