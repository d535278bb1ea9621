"""Trees of smoothed and rotated weights: through what users save them with, their shardings, their other configs."""

import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jint8
import jint8.linen  # which tells flax.serialization of QTensor
from jint8._core.calibration import Calibration

ROTATED = jint8.Config.preset("rotated")
CONFIGS = {"rotated": ROTATED, "columns": jint8.Config(outliers="static", rotate=64)}
MESH = jax.sharding.AbstractMesh((2, 4), ("data", "model"))


def normal(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


FLOATS = {
    "dense": {"kernel": normal(128, 8), "bias": normal(8)},
    "weight": normal(6, 48),
    "out": {"kernel": normal(4, 8, 12)},
    "layers": normal(96, 3, 5),
}
PLAN = jint8.Plan(
    {"dense/kernel": (0,), "weight": (1,), "out/kernel": (0, 1), "layers": (0,)},
    {"dense/kernel": (), "weight": (), "out/kernel": (), "layers": (1,)},
)
BLOCKS = {"dense/kernel": 64, "weight": 16, "out/kernel": 32, "layers": 32}
FOUND = Calibration(
    {"dense/kernel": [3, 17], "layers": [[3], [5], [96]]},
    {"dense/kernel": np.linspace(0.5, 20, 128, dtype=np.float32), "layers": np.ones((3, 96), np.float32)},
)


@pytest.fixture(params=CONFIGS, scope="module")
def int8(request):
    return jint8.quantize_params(FLOATS, config=CONFIGS[request.param], plan=PLAN, outliers=FOUND)


@pytest.fixture(scope="module")
def rotated():
    return jint8.quantize_params(FLOATS, config=ROTATED, plan=PLAN, outliers=FOUND)


def weights(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, jint8.QTensor))
    named = {"/".join(key.key for key in path): leaf for path, leaf in leaves}
    return {path: leaf for path, leaf in named.items() if isinstance(leaf, jint8.QTensor)}


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.array_equal(a, b)


@pytest.mark.first_case
def test_blocks_factors_and_values(int8):
    """Each weight has the largest block that divides its features, and factors for just these and its layers."""
    assert {path: w.config.rotate for path, w in weights(int8).items()} == BLOCKS
    shapes = {path: w.smooth.shape for path, w in weights(int8).items()}
    assert shapes == {"dense/kernel": (1, 128), "weight": (1, 48), "out/kernel": (1, 4, 8), "layers": (1, 3, 96)}
    back = jint8.dequantize_params(int8)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, atol=0.2), back, FLOATS)
    largest = max(jax.tree.leaves(jax.tree.map(lambda got, want: float(jnp.abs(got - want).max()), back, FLOATS)))
    assert 0 < largest < 0.2


def test_calibrated_columns_are_kept_in_16_bits():
    both = weights(jint8.quantize_params(FLOATS, config=CONFIGS["columns"], plan=PLAN, outliers=FOUND))
    np.testing.assert_allclose(
        both["dense/kernel"].dequantize()[np.array([3, 17])], FLOATS["dense"]["kernel"][np.array([3, 17])], rtol=2**-10
    )
    layers = both["layers"].dequantize()
    for layer, column in enumerate((3, 5)):
        np.testing.assert_allclose(layers[column, layer], FLOATS["layers"][column, layer], rtol=2**-10)
    assert both["layers"].smooth[0, 0, 3] == both["layers"].smooth[0, 1, 5] == 1
    assert both["weight"].outlier_rows is None


def test_a_plain_mapping_does_not_say_which_layers_are_smoothed_together():
    with pytest.raises(
        ValueError, match=r"layers: Expected a plan .* smooths each of the stacked weights, got a plain"
    ):
        jint8.quantize_params(FLOATS, config=ROTATED, plan={"layers": (0,)})
    two = jint8.quantize_params(FLOATS, config=ROTATED, plan={"dense/kernel": (0,), "weight": (1,)})
    planned = jint8.quantize_params(FLOATS, config=ROTATED, plan=jint8.Plan({"dense/kernel": (0,), "weight": (1,)}))
    assert_same(two, planned)


def test_names_instead_of_a_plan():
    with pytest.warns(UserWarning, match=r"layers: its name and its shape \(96, 3, 5\) don't say"):
        got = weights(jint8.quantize_params(FLOATS, config=ROTATED))
    assert {path: w.config.rotate for path, w in got.items()} == {
        path: BLOCKS[path] for path in ("dense/kernel", "weight", "out/kernel")
    }


SAVED = {
    "pickle": lambda tree, _: pickle.loads(pickle.dumps(tree)),
    "flax": lambda tree, target: flax.serialization.from_bytes(target, flax.serialization.to_bytes(tree)),
    "flax state": lambda tree, target: flax.serialization.from_state_dict(
        target, flax.serialization.to_state_dict(tree)
    ),
}


@pytest.mark.parametrize("how", SAVED)
def test_serialization(how, int8):
    assert_same(SAVED[how](int8, jax.eval_shape(lambda: int8)), int8)


def test_flax_restores_what_was_saved_into_a_target_that_is_not_rotated(int8):
    target = jint8.quantize_params(FLOATS, plan=PLAN)
    assert_same(SAVED["flax"](int8, target), int8)
    assert_same(SAVED["flax"](target, int8), target)


@pytest.mark.filterwarnings("ignore")
def test_orbax(int8, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint isn't installed")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", int8)
        checkpointer.wait_until_finished()
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, int8)
        assert_same(checkpointer.restore(tmp_path / "checkpoint", target), int8)


def test_an_exported_program_takes_rotated_weights(int8):
    """As arguments: the number of a weight's arrays, and what it was rotated by, survive."""
    product = jax.jit(lambda x, tree: jint8.matmul(x, tree["dense"]["kernel"]))
    x = normal(5, 128)
    restored = jax.export.deserialize(jax.export.export(product)(x, int8).serialize())
    assert np.array_equal(restored.call(x, int8), product(x, int8))
    want = np.float64(x) @ np.float64(int8["dense"]["kernel"].dequantize())
    assert np.abs(product(x, int8) - want).max() < 0.02 * np.abs(want).max()


def test_another_config_keeps_what_a_weight_was_rotated_by(rotated):
    finer = weights(jint8.with_config(rotated, jint8.Config(scheme="vector", digits=2, rotate=64)))
    assert {path: (w.config.rotate, w.config.digits) for path, w in finer.items()} == {
        path: (block, 2) for path, block in BLOCKS.items()
    }
    with pytest.raises(ValueError, match="Expected a config with rotate=64, as the weight was quantized, got rotate=0"):
        jint8.with_config(rotated, jint8.Config())
    with pytest.raises(ValueError, match=r"Expected a config with rotate=0, .* got rotate=64"):
        jint8.with_config(jint8.quantize_params(FLOATS, plan=PLAN), ROTATED)


def test_float_activations(int8):
    """The scheme "none" multiplies by what the weights stand for, and those keep standing for it."""
    tree = jint8.with_config(int8, jint8.Config(scheme="none"))
    assert {path: w.config.rotate for path, w in weights(tree).items()} == BLOCKS
    for path, w in weights(tree).items():
        np.testing.assert_array_equal(w.dequantize(), weights(int8)[path].dequantize())
    x, w = normal(5, 128), int8["dense"]["kernel"]
    want = np.float64(x) @ np.float64(w.dequantize())
    for got in (
        jint8.matmul(x, tree["dense"]["kernel"]),
        jint8.matmul(x, w, config=jint8.Config(scheme="none")),
        jint8.matmul(x, w, implementation="dequantize"),
    ):
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_a_tree_of_nothing_has_the_structure_of_the_weights(int8):
    """As libraries make it that map a function without a result, and compare the trees."""
    is_none = lambda leaf: leaf is None
    nothing = jax.tree.map(lambda _: None, int8)
    assert jax.tree.structure(nothing, is_leaf=is_none) == jax.tree.structure(int8, is_leaf=is_none)


def test_memory_report_counts_the_factors(int8, rotated):
    w = rotated["dense"]["kernel"]
    assert w.nbytes == 128 * 8 + 4 * 8 + 4 * 128
    assert jint8.memory_report(int8).groups["dense/kernel"] == (4 * 128 * 8, int8["dense"]["kernel"].nbytes)
    assert jint8.memory_report(jax.eval_shape(lambda: int8)) == jint8.memory_report(int8)


def specs_of(w):
    return {name: getattr(w, name).spec for name in ("q", "scale", "smooth")}


def test_shardings(rotated):
    """The factors are sharded where the features are, and whole where output channels are sharded."""
    specs = {"dense": {"kernel": P("data", "model"), "bias": P()}, "weight": P("data"), "out": P()}
    placed = jint8.shardings(rotated, {**specs, "layers": P(None, None, None)}, mesh=MESH)
    assert jax.tree.structure(placed) == jax.tree.structure(rotated)
    assert specs_of(placed["dense"]["kernel"]) == {
        "q": P("model", "data"), "scale": P("model", None), "smooth": P(None, "data")
    }  # fmt: skip
    assert specs_of(placed["weight"]) == {"q": P("data", None), "scale": P("data", None), "smooth": P(None, None)}
    layers = jint8.shardings(rotated["layers"], P("data", None, None), mesh=jax.sharding.AbstractMesh((1,), ("data",)))
    assert specs_of(layers) == {
        "q": P(None, None, "data"),
        "scale": P(None, None, None),
        "smooth": P(None, None, "data"),
    }


@pytest.mark.parametrize(
    ("path", "spec", "message"),
    [
        (
            "dense/kernel",
            P("model"),
            "blocks of the 64 features that are rotated together, got runs of 32 .* rotate=32",
        ),
        ("weight", P(None, "data"), "blocks of the 16 features that are rotated together, got runs of 24 .* rotate=8"),
        (
            "out/kernel",
            P("data"),
            "blocks of the 32 features .*, got runs of 16 features each: quantize it .*rotate=16",
        ),
        ("out/kernel", P(None, "model"), "blocks of the 32 features .*, got runs of 2 features each.* rotate=2"),
        ("layers", P("data"), "blocks of the 32 features that are rotated together, got runs of 48 .* rotate=16"),
    ],
    ids=["shorter", "not_a_multiple", "heads", "size_of_heads", "stacked"],
)
def test_a_block_on_several_devices_is_refused(path, spec, message, rotated):
    tree = {path: weights(rotated)[path]}
    with pytest.raises(ValueError, match=f"{path}: Expected devices to have whole {message}"):
        jint8.shardings(tree, {path: spec}, mesh=MESH)


def test_the_block_that_the_error_names_fits():
    w = jax.eval_shape(lambda: jint8.quantize(jnp.ones((576, 8)), config=ROTATED))
    with pytest.raises(ValueError, match=r"runs of 288 features each: quantize it with rotate=32"):
        jint8.shardings({"w": w}, {"w": P("data")}, mesh=MESH)
    w = jax.eval_shape(lambda: jint8.quantize(jnp.ones((576, 8)), config=jint8.Config(scheme="vector", rotate=32)))
    assert jint8.shardings({"w": w}, {"w": P("data")}, mesh=MESH)["w"].smooth.spec == P("data", None)


def test_placed_on_one_device(int8):
    mesh = jax.make_mesh((1,), ("model",))
    placed = jax.device_put(int8, jint8.shardings(int8, jax.tree.map(lambda _: P("model"), FLOATS), mesh=mesh))
    assert_same(placed, int8)
    assert placed["dense"]["kernel"].smooth.sharding == NamedSharding(mesh, P(None, "model"))
