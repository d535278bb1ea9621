"""What 0.1.0 saved and exported loads, bit for bit. The files were made by tests/fixtures/make_saved.py."""

import pickle
import shutil
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jint8
import jint8.linen  # which tells flax.serialization of QTensor, in whatever order the two were imported

FOLDER = Path(__file__).parents[1] / "fixtures" / "saved-0.1.0"
EXPECTED = np.load(FOLDER / "expected.npz")
FIELDS = ("q", "scale", "zero", "outlier_rows", "outlier_index")


def saved_tree():
    return jax.tree.map(jnp.asarray, pickle.loads((FOLDER / "tree.pickle").read_bytes()))


def assert_as_saved(tree):
    """The arrays' bits, and the floats that they stand for: those depend on every static field."""
    weights = {
        "/".join(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, jint8.QTensor))
    }
    assert len(weights) == 13
    for name, leaf in weights.items():
        if not isinstance(leaf, jint8.QTensor):
            assert np.array_equal(leaf, EXPECTED[f"array/{name}"])
            continue
        arrays = {field: getattr(leaf, field) for field in FIELDS if getattr(leaf, field) is not None}
        assert {f"{field}/{name}" for field in arrays} == {f"{f}/{name}" for f in FIELDS if f"{f}/{name}" in EXPECTED}
        for field, array in arrays.items():
            assert array.dtype == EXPECTED[f"{field}/{name}"].dtype
            assert np.array_equal(array, EXPECTED[f"{field}/{name}"]), (field, name)
        assert np.array_equal(leaf.dequantize(jnp.float32), EXPECTED[f"float/{name}"]), name
        assert leaf.shape == EXPECTED[f"float/{name}"].shape


def test_pickle():
    tree = saved_tree()
    assert_as_saved(tree)
    configs = {name: leaf.config for name, leaf in tree.items() if isinstance(leaf, jint8.QTensor)}
    assert tree["dense"]["kernel"].config == jint8.Config(threshold=5.0)
    assert tree["bf16"]["kernel"].config == jint8.Config(digits=2)
    assert tree["bf16"]["kernel"].dtype == jnp.bfloat16
    assert configs["static"] == jint8.Config(scheme="llm.int8-zp", outliers="static")
    assert configs["layers_2"] == jint8.Config(relative=True)


def test_slices_of_stacked_layers():
    """A layer of a scanned weight, as it was saved, stands for that layer's floats."""
    tree = saved_tree()
    for name, axis in (("layers_0", 0), ("layers_1", 1), ("layers_2", 2), ("static_layers", 0)):
        layer = jax.tree.map(lambda leaf, axis=axis: jnp.take(leaf, 1, axis=axis), tree[name])
        assert np.array_equal(layer.dequantize(jnp.float32), np.take(EXPECTED[f"float/{name}"], 1, axis)), name


def test_flax_bytes():
    target = jax.tree.map(jnp.zeros_like, saved_tree())
    assert_as_saved(flax.serialization.from_bytes(target, (FOLDER / "tree.msgpack").read_bytes()))


@pytest.mark.filterwarnings("ignore")
def test_orbax(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint isn't installed")
    shutil.copytree(FOLDER / "orbax", tmp_path / "orbax")
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, saved_tree())
    with ocp.StandardCheckpointer() as checkpointer:
        assert_as_saved(checkpointer.restore(tmp_path / "orbax", target))


def test_exported_program():
    program = jax.export.deserialize(bytearray((FOLDER / "program.bin").read_bytes()))
    y = program.call({"dense": saved_tree()["dense"]}, EXPECTED["program/x"])
    np.testing.assert_allclose(y, EXPECTED["program/y"], rtol=1e-5, atol=1e-6)


def test_exported_kernels():
    """A program for CPUs and CUDA; its weight is made here, with the metadata of this version."""
    program = jax.export.deserialize(bytearray((FOLDER / "kernels.bin").read_bytes()))
    w = jint8.QTensor(jnp.asarray(EXPECTED["kernels/q"]), jnp.asarray(EXPECTED["kernels/scale"]))
    np.testing.assert_allclose(program.call(EXPECTED["kernels/x"], w), EXPECTED["kernels/y"], rtol=1e-5, atol=1e-6)


def test_model():
    model = jint8.load(FOLDER / "model", dtype="float32", verify=True)
    assert model.quant == jint8.Config(scheme="llm.int8-zp", outliers="static", digits=2)
    logits = model.logits(EXPECTED["model/tokens"])
    np.testing.assert_allclose(logits, EXPECTED["model/logits"], rtol=1e-4, atol=1e-4)
