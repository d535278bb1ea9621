"""Shardings of quantized trees, and products on eight devices (virtual, on the CPU) against one."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from virtual_devices import run_on_eight_devices

import jint8

MESH = jax.sharding.AbstractMesh((2, 4), ("data", "model"))


def abstract(shape, **kwargs):
    return jax.eval_shape(lambda: jint8.quantize(jnp.ones(shape), **kwargs))


def specs_of(w):
    return {name: getattr(w, name).spec for name in ("q", "scale", "zero") if getattr(w, name) is not None}


@pytest.mark.parametrize(
    ("w", "spec", "q", "scale"),
    [
        (abstract((8, 16)), P(None, "model"), P(None, "model"), P(None, "model")),
        (abstract((8, 16)), P("model"), P("model", None), P(None, None)),
        (abstract((8, 16)), P("data", "model"), P("data", "model"), P(None, "model")),
        (abstract((8, 16)), P(("data", "model")), P(("data", "model"), None), P(None, None)),
        (abstract((8, 16)), None, P(None, None), P(None, None)),
        (abstract((16, 8), contract_axes=(1,)), P("model", "data"), P("model", "data"), P("model", None)),
        (
            abstract((3, 8, 16), contract_axes=(1,), stack_axes=(0,)),
            P(None, "data", "model"),
            P(None, "data", "model"),
            P(None, None, "model"),
        ),
    ],
    ids=["column", "row", "both", "two_axes_of_the_mesh", "whole", "[n,k]", "stacked"],
)
def test_specs(w, spec, q, scale):
    got = jint8.shardings({"w": w}, {"w": spec}, mesh=MESH)["w"]
    assert specs_of(got) == {"q": q, "scale": scale}
    assert got.config == w.config


def test_weights_that_are_stored_in_another_order():
    params = {"dense": {"kernel": jax.ShapeDtypeStruct((8, 16), jnp.float32)}}
    w = jax.eval_shape(jint8.quantize_params, params)["dense"]["kernel"]
    assert w.q.shape == (16, 8)
    got = jint8.shardings(w, P("data", "model"), mesh=MESH)
    assert specs_of(got) == {"q": P("model", "data"), "scale": P("model", None)}


def test_zero_points_are_sharded_like_scales():
    got = jint8.shardings(abstract((8, 16), config=jint8.Config(scheme="vector-zp")), P("data", "model"), mesh=MESH)
    assert specs_of(got) == {"q": P("data", "model"), "scale": P(None, "model"), "zero": P(None, "model")}


def test_a_prefix_and_named_shardings():
    params = {"a": {"kernel": abstract((8, 16)), "bias": jnp.ones(16)}, "b": jnp.ones(8)}
    got = jint8.shardings(params, {"a": None, "b": NamedSharding(MESH, P("model"))}, mesh=MESH)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    assert specs_of(got["a"]["kernel"]) == {"q": P(None, None), "scale": P(None, None)}
    assert got["b"].spec == P("model")


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (P("model", None, None), ValueError, r"up/kernel: Expected at most 2 axes in the spec for shape \(8, 18\)"),
        (P(None, "model"), ValueError, r"up/kernel: Expected shape \(8, 18\) to be divided by 4 devices"),
        (P("pipe"), ValueError, r"up/kernel: Expected axes of the mesh \('data', 'model'\), got 'pipe'"),
        ("model", TypeError, "up/kernel: Expected a PartitionSpec, a NamedSharding or None, got str"),
        ({}, ValueError, "up/kernel: Expected a spec for it or for a tree that it is in, got none"),
        ({"q": P()}, ValueError, "up/kernel: Expected a spec for it or for a tree that it is in, got none"),
    ],
    ids=["rank", "size", "axis", "type", "none", "structure"],
)
def test_errors(spec, error, message):
    with pytest.raises(error, match=message):
        jint8.shardings({"up": {"kernel": abstract((8, 18))}}, {"up": {"kernel": spec}}, mesh=MESH)


def test_specs_of_whole_collections():
    params = {"params": {"w": jnp.ones((8, 16))}, "batch_stats": {"mean": jnp.ones(16)}}
    got = jint8.shardings(params, {"params": P("model"), "batch_stats": P()}, mesh=MESH)
    assert (got["params"]["w"].spec, got["batch_stats"]["mean"].spec) == (P("model", None), P(None))


def test_specs_that_are_of_nothing():
    with pytest.raises(ValueError, match="Expected specs for parameters that there are, got down, up/bias"):
        jint8.shardings({"up": {"w": jnp.ones(8)}}, {"up": {"w": P(), "bias": P()}, "down": P()}, mesh=MESH)


def test_a_spec_needs_a_mesh():
    with pytest.raises(ValueError, match="w: Expected a mesh"):
        jint8.shardings({"w": abstract((8, 16))}, {"w": P()})


@pytest.fixture(scope="module")
def on_eight_devices():
    return run_on_eight_devices(Path(__file__).parent / "products_on_a_mesh.py")


LAYOUTS = ["column", "row", "column_and_row"]
ROWS = [1, 64]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("layout", [*LAYOUTS, "batch", "model"])
def test_products_equal_those_on_one_device(on_eight_devices, layout, rows):
    if layout in ("batch", "model") and rows == 1:
        pytest.skip("one row can't be divided")
    found = on_eight_devices[f"{layout} {rows}"]
    assert found["integers_equal"]
    assert found["error"] < 1e-6
    assert found["bytes_per_device"] < (0.3 if layout == "model" else 0.2) * found["bytes"] or layout == "batch"


@pytest.mark.parametrize("rows", ROWS)
def test_a_column_parallel_product_needs_no_communication(on_eight_devices, rows):
    assert on_eight_devices[f"column {rows}"]["collectives"] == []


def test_a_product_of_many_rows_and_divided_features_sends_no_columns(on_eight_devices):
    assert set(on_eight_devices["model 64"]["collectives"]) == {"all-reduce"}


def test_a_row_parallel_product_of_one_row_reduces_its_scales_and_its_sums(on_eight_devices):
    assert on_eight_devices["row 1"]["collectives"] == ["all-reduce"] * len(on_eight_devices["row 1"]["collectives"])
    assert 1 <= len(on_eight_devices["row 1"]["collectives"]) <= 3
