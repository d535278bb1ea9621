"""Trees of weights in four bits: through what users save them with, their shardings, their other configs."""

import pickle
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import PartitionSpec as P
from virtual_devices import run_on_eight_devices

import jint8
import jint8.linen  # which tells flax.serialization of QTensor
from jint8._core.calibration import Calibration

MESH = jax.sharding.AbstractMesh((2, 4), ("data", "model"))
FLOATS = {
    "dense": {"kernel": (256, 8), "bias": (8,)},
    "weight": (64, 50),
    "out": {"kernel": (4, 8, 12)},
    "layers": (96, 3, 64),
}
FLOATS = jax.tree.map(
    lambda shape: jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32),
    FLOATS,
    is_leaf=lambda x: isinstance(x, tuple),
)
PLAN = jint8.Plan(
    {"dense/kernel": (0,), "weight": (1,), "out/kernel": (0, 1), "layers": (0,)},
    {"dense/kernel": (), "weight": (), "out/kernel": (), "layers": (1,)},
)


def config(grouping="oc", **options):
    return jint8.Config(scheme="int4", group=16, grouping=grouping, **options)


@pytest.fixture(params=["oc", "ic"], scope="module")
def tree(request):
    return jint8.quantize_params(FLOATS, config=config(request.param), plan=PLAN)


def weights(tree):
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, jint8.QTensor))
    return [leaf for leaf in leaves if isinstance(leaf, jint8.QTensor)]


@pytest.mark.first_case
def test_shapes_and_floats(tree):
    back = jint8.dequantize_params(tree)
    assert jax.tree.map(jnp.shape, back) == jax.tree.map(jnp.shape, FLOATS)
    assert len(weights(tree)) == 4
    for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(FLOATS), strict=True):
        assert float(jnp.abs(got - want).mean()) < 0.12
    report = jint8.memory_report(tree)
    assert report.bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert report.float_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(FLOATS))


@pytest.mark.parametrize(
    "there_and_back",
    [
        lambda tree: pickle.loads(pickle.dumps(tree)),
        lambda tree: flax.serialization.from_bytes(tree, flax.serialization.to_bytes(tree)),
        lambda tree: jax.tree.map(jnp.array, tree),
    ],
    ids=["pickle", "flax", "map"],
)
def test_there_and_back(tree, there_and_back):
    again = there_and_back(tree)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), again, tree)))


def test_exported_with_the_program(tree):
    f = jax.jit(lambda tree, x: jint8.matmul(x, tree["weight"]))
    x = jnp.ones((3, 50))
    again = export.deserialize(export.export(f)(tree, x).serialize())
    np.testing.assert_allclose(again.call(tree, x), f(tree, x), rtol=1e-6)


@pytest.mark.slow
def test_outliers_of_calibration_are_for_static_ones():
    found = Calibration({"weight": [3]}, {"weight": np.ones(50, np.float32)})
    for outliers, held in (("batch", False), ("static", True)):
        tree = jint8.quantize_params(FLOATS, config=config("ada", outliers=outliers), plan=PLAN, outliers=found)
        assert (tree["weight"].outlier_index is not None) == held
    tree = jint8.quantize_params(FLOATS, config=config(), plan=PLAN, outliers={"weight": [3]})
    assert tree["weight"].outlier_rows is not None


def test_a_plain_mapping_does_not_say_what_is_stacked():
    plain = {"layers": (0,)}
    assert jint8.quantize_params(FLOATS, config=config("oc"), plan=plain)["layers"].features == 96
    for grouping in ("ic", "ada"):
        with pytest.raises(ValueError, match="layers: Expected a plan that says which axes are stacked"):
            jint8.quantize_params(FLOATS, config=config(grouping), plan=plain)


def test_other_configs(tree):
    same = jint8.with_config(tree, jint8.Config(scheme="none"))
    assert same["weight"].config == tree["weight"].config
    with pytest.raises(ValueError, match="weight: Expected a config of the scheme 'int4'"):
        jint8.with_config({"weight": tree["weight"]}, jint8.Config())


def specs_of(w):
    return {name: getattr(w, name).spec for name in ("q", "scale", "group_scale", "group_min")}


def test_shardings():
    """Features by whole blocks; groups with what they are of, where no device would have a part of one."""
    specs = {"dense": {"kernel": P("model"), "bias": P()}, "weight": P("model"), "out": P("data"), "layers": P()}
    oc, ic = (
        jint8.shardings(jint8.quantize_params(FLOATS, config=config(g), plan=PLAN), specs, mesh=MESH)
        for g in ("oc", "ic")
    )
    assert specs_of(oc["dense"]["kernel"])["q"] == specs_of(ic["dense"]["kernel"])["q"] == P(None, "model")
    assert specs_of(oc["dense"]["kernel"])["group_scale"] == P(None, "model")
    assert specs_of(ic["dense"]["kernel"])["group_scale"] == P(None, "model")
    assert specs_of(oc["dense"]["kernel"])["scale"] == P(None, None)
    assert specs_of(oc["weight"])["group_scale"] == P("model", None)
    assert specs_of(ic["weight"])["group_scale"] == P("model", None)  # 64 channels in 4 groups of 16
    narrow = jint8.quantize_params(FLOATS, config=jint8.Config(scheme="int4", grouping="ic", group=64), plan=PLAN)
    assert specs_of(jint8.shardings(narrow, specs | {"dense": P()}, mesh=MESH)["weight"])["group_scale"] == P(
        None, None
    )
    with pytest.raises(ValueError, match=r"whole blocks of the 128 features that share bytes, .* got runs of 64"):
        jint8.shardings(narrow, specs, mesh=MESH)


@pytest.mark.slow
def test_products_on_a_mesh():
    """No device is sent another's weights; each has its eighth, and of the columns' layout all scales of channels."""
    found = run_on_eight_devices(Path(__file__).parent / "four_bits_on_a_mesh.py")
    assert len(found) == 8
    for name, result in found.items():
        assert result["error"] < 1e-5, name
        assert not result["gathers"], name
        assert result["bytes"] < 0.15, name
