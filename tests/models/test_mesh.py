"""A model that is divided among devices equals the one on a single device."""

from pathlib import Path

import jax
import pytest
from family_files import DIRECTORY
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from virtual_devices import run_on_eight_devices

import jint8
from jint8.models import partition_specs

FAMILIES = ["llama"]  # each costs four compilations for eight devices


@pytest.fixture(scope="module")
def found():
    return run_on_eight_devices(Path(__file__).parent / "models_on_a_mesh.py", *FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_greedy_tokens(found, name):
    assert found[name]["error"] < 1e-4
    one, divided = found[name]["greedy"]
    assert one == divided


@pytest.mark.parametrize("name", FAMILIES)
def test_each_device_holds_about_its_share(found, name):
    assert found[name]["bytes_per_device"] < 0.6 * found[name]["bytes"]


def test_specs():
    params = jint8.load(DIRECTORY / "opt").params
    specs = partition_specs(params, AbstractMesh((2, 2), ("data", "model")))
    layer = specs["layers_0"]
    assert layer["attention"]["qkv"] == {"weight": P("model", None), "bias": P("model")}
    assert layer["attention"]["out"] == {"weight": P(None, "model"), "bias": P()}
    assert layer["mlp"]["down"]["weight"] == P(None, "model")
    assert specs["embedding"] == P("model")
    assert specs["positions"] == P()


def test_a_vocabulary_that_is_not_divided_stays_whole():
    mesh = AbstractMesh((3,), ("model",))
    specs = partition_specs({"embedding": jax.ShapeDtypeStruct((128, 32), "float32")}, mesh)
    assert specs == {"embedding": P()}


def test_an_axis_that_the_mesh_has_not():
    with pytest.raises(ValueError, match="Expected a mesh with an axis 'model'"):
        partition_specs({}, AbstractMesh((2, 2), ("data", "tensor")))


def test_a_checkpoint_that_the_mesh_does_not_divide():
    with pytest.raises(ValueError, match=r"layers_0/attention/out/weight: Expected shape .* divided by 5 devices"):
        jint8.load(DIRECTORY / "llama", mesh=AbstractMesh((5,), ("model",)))
