"""Int8 trees through what users save trees with: bit for bit the same afterwards."""

import pickle
from pathlib import Path

import cases
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from virtual_devices import run_on_eight_devices

import jint8

X = cases.normal(2, 3, 32, seed=1)
MODEL = nn.Sequential([nn.Dense(64), nn.gelu, nn.Dense(8)])
CONFIGS = {
    "paper": jint8.Config(),
    "zero points": jint8.Config(scheme="llm.int8-zp", threshold=5.5, outliers="token"),
}


@pytest.fixture(params=CONFIGS)
def params(request):
    _floats, int8, _ = cases.quantize_linen(MODEL, X, config=CONFIGS[request.param])
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if leaf.ndim == 1 else leaf, int8)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)


def test_pickle(params):
    assert_same(pickle.loads(pickle.dumps(params)), params)


def test_flax_bytes(params):
    target = jax.tree.map(jnp.zeros_like, params)
    assert_same(flax.serialization.from_bytes(target, flax.serialization.to_bytes(params)), params)


def test_flax_state_dict(params):
    state = flax.serialization.to_state_dict(params)
    assert set(state["params"]["layers_0"]["kernel"]) <= {"q", "scale", "zero", "static"}
    assert_same(flax.serialization.from_state_dict(params, state), params)


def test_flax_abstract_target(params):
    target = jax.eval_shape(lambda: params)
    assert_same(flax.serialization.from_bytes(target, flax.serialization.to_bytes(params)), params)


def test_flax_keeps_what_was_saved():
    """The config and the order come from the file: the target's would read the values wrongly."""
    w = jint8.quantize_params({"kernel": jnp.arange(16.0).reshape(4, 4)})
    other = jint8.quantize_params(w, config=jint8.Config()) | {
        "kernel": jint8.quantize(jnp.ones((4, 4)), config=jint8.Config(threshold=1.0))
    }
    assert_same(flax.serialization.from_bytes(other, flax.serialization.to_bytes(w)), w)


def test_flax_errors_name_the_leaf():
    w = {"a": {"kernel": jint8.quantize(jnp.ones((4, 4)))}}
    with pytest.raises(ValueError, match=r"a/kernel: Expected a saved QTensor"):
        flax.serialization.from_state_dict(w, {"a": {"kernel": {"q": jnp.ones((4, 4))}}})
    with pytest.raises(ValueError, match=r"a/kernel: Expected int8 values of shape \(4, 4\), got \(4, 5\)"):
        flax.serialization.from_state_dict(
            w, flax.serialization.to_state_dict({"a": {"kernel": jint8.quantize(jnp.ones((4, 5)))}})
        )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("more", jnp.ones((4, 1)), "a/kernel: Expected q, scale, .* and static, got more"),
        ("static", '{"dtype": "float32", "config": {}, "new": 1}', "a/kernel: Expected static fields .*, got new"),
        ("static", '{"dtype": "float32", "config": {"new": 1}}', "a/kernel: Expected options of a Config .*, got new"),
        ("static", '{"dtype": "float32"}', "a/kernel: Expected a QTensor's config, got dtype"),
    ],
    ids=["array", "static_field", "option", "missing"],
)
def test_flax_refuses_unknown_fields(field, value, message):
    w = {"a": {"kernel": jint8.quantize(jnp.ones((4, 4)))}}
    state = flax.serialization.to_state_dict(w)
    state["a"]["kernel"][field] = value
    with pytest.raises(ValueError, match=message):
        flax.serialization.from_state_dict(w, state)


@pytest.mark.filterwarnings("ignore")
def test_orbax(params, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint isn't installed")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", params)
        checkpointer.wait_until_finished()
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, params)
        assert_same(checkpointer.restore(tmp_path / "checkpoint", target), params)


@pytest.mark.filterwarnings("ignore")
def test_orbax_of_an_nnx_model(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint isn't installed")
    make = lambda: jint8.nnx.quantize(nnx.Linear(32, 8, rngs=nnx.Rngs(0)))
    model, abstract = make(), nnx.eval_shape(make)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", nnx.state(model))
        checkpointer.wait_until_finished()
        graphdef, state = nnx.split(abstract)
        restored = nnx.merge(graphdef, checkpointer.restore(tmp_path / "checkpoint", state))
    assert jnp.array_equal(restored(X), model(X))


@pytest.mark.slow
def test_orbax_onto_another_mesh(tmp_path):
    pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint isn't installed")
    found = run_on_eight_devices(Path(__file__).parent / "orbax_on_a_mesh.py", tmp_path / "checkpoint")
    assert found == {"structure": True, "values": True, "places": True, "part": [64, 32]}  # of [n, k]: k by 4


@pytest.mark.first_case
@pytest.mark.parametrize("name", ["plain", "scanned"])
def test_export(name):
    """The weights are arguments of the exported program, so the pytree type has to survive."""
    module = MODEL
    first = lambda tree: jax.tree.leaves(tree)[0]
    if name == "scanned":

        class Model(nn.Module):
            @nn.compact
            def __call__(self, x):
                body = nn.scan(
                    lambda layer, x, _: (layer(x), None),
                    variable_axes={"params": 1},
                    split_rngs={"params": True},
                    length=3,
                )
                return body(nn.Dense(32, name="dense"), x, None)[0]

        module = Model()
    _, int8, _ = cases.quantize_linen(module, X)
    function = jax.jit(lambda params, x: first(jint8.apply(module.apply)(params, x)))
    serialized = jax.export.export(function)(int8, X).serialize()
    restored = jax.export.deserialize(serialized)
    assert jnp.array_equal(restored.call(int8, X), function(int8, X))


def test_key_paths_are_readable():
    w = {"up": {"kernel": jint8.quantize(jnp.ones((4, 4)))}}
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(w)]
    assert paths == ["['up']['kernel'].q", "['up']['kernel'].scale"]
