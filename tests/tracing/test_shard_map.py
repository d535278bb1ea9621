"""Int8 weights in `jax.shard_map`: products of the parts that each device has."""

from pathlib import Path

import cases
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec
from virtual_devices import run_on_eight_devices

import jint8

P = PartitionSpec
X = cases.normal(4, 32)
W = cases.normal(32, 16, seed=1) / 6


@pytest.fixture(scope="module")
def found():
    return run_on_eight_devices(Path(__file__).with_name("shard_map_on_a_mesh.py"), optimized=False)


@pytest.mark.slow
def test_products_of_parts(found):
    errors = {name: error for name, error in found.items() if not name.startswith("refused")}
    assert len(errors) == 5 * 2 * 4 + 3
    for name, error in errors.items():
        decomposes = "llm.int8" in name or name in ("experts", "calibrated")
        assert error < (0.0015 if decomposes else 0.025), name
    for name in ("whole", "contracted", "both"):  # each device finds its outliers
        assert found[f"{name}, llm.int8, True"] < 0.2 * found[f"{name}, threshold 0, True"]


@pytest.mark.slow
def test_what_means_the_features_of_the_whole_weight_is_refused(found):
    assert "not to divide a weight with outlier_rows over devices" in found["refused: calibrated"]
    assert "not to divide a weight with smooth over devices" in found["refused: rotated"]


def test_on_one_device():
    mesh = jax.make_mesh((1, 1), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def body(x, w):
        assert jax.sharding.get_abstract_mesh().manual_axes == ("a", "b")
        return jax.lax.psum(jnp.tanh(x) @ w, "a")

    mapped = jax.shard_map(body, mesh=mesh, in_specs=(P(None, "a"), P("a", "b")), out_specs=P(None, "b"))
    run = lambda params, x: mapped(x, params["w"])
    int8 = jint8.quantize_params({"w": W}, plan=jint8.plan(run, {"w": W}, X))
    assert cases.count_int8_products(jint8.apply(run), int8, X) == 1
    got = cases.jit(jint8.apply(run))(int8, X)
    assert cases.relative_error(got, jint8.matmul(jnp.tanh(X), jint8.quantize(W))) < 1e-6


def test_a_weight_that_is_handed_back_is_refused():
    mesh = jax.make_mesh((1,), ("a",), axis_types=(AxisType.Auto,))
    gathered = jax.shard_map(lambda w: w.T, mesh=mesh, in_specs=P(), out_specs=P())
    int8 = jint8.quantize_params({"w": W}, plan={"w": (0,)})
    with pytest.raises(TypeError, match="shard_map not to return an int8 weight"):
        jint8.apply(lambda params, x: x @ gathered(params["w"]).T)(int8, X)
