"""A model that is sharded over devices equals the one on a single device."""

from collections import Counter
from pathlib import Path

import jax
import pytest
from checkpoint_files import find_smollm2
from family_files import DIRECTORY, NAMES
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from virtual_devices import run_on_eight_devices

import jint8
from jint8.models import partition_specs

WITH_TOKENS = ["llama", "bloom"]  # four devices don't divide their key-value heads evenly
FIXTURES = [*WITH_TOKENS, "opt_350m"]
OTHERS = sorted(set(NAMES) - set(FIXTURES))  # each costs two compilations
LAYERS = 2
DEVICES = {"one_row": 8, "rows_on_two_axes": 4, "experts": 8, "int8_cache": 8}
ROWS = {"one_row": 1, "rows_on_two_axes": 4, "experts": 1, "int8_cache": 1}

pytestmark = pytest.mark.slow  # several processes compile whole models


@pytest.fixture(scope="module")
def found():
    names = [f"{name}+" if name in WITH_TOKENS else name for name in FIXTURES]
    return run_on_eight_devices(Path(__file__).parent / "models_on_a_mesh.py", *names, optimized=False)


@pytest.mark.parametrize("name", FIXTURES)
def test_logits(found, name):
    assert found[name]["error"] < 1e-5


@pytest.fixture(scope="module")
def others():
    return run_on_eight_devices(Path(__file__).parent / "models_on_a_mesh.py", *OTHERS, optimized=False)


@pytest.mark.parametrize("name", OTHERS)
def test_logits_of_the_others(others, name):
    assert others[name]["error"] < 1e-5


@pytest.mark.skipif(find_smollm2() is None, reason="needs SmolLM2-135M-Instruct in the cache or at $JINT8_TEST_SMOLLM2")
def test_text_of_smollm2():
    script = Path(__file__).parent / "text_on_a_mesh.py"
    found = run_on_eight_devices(script, str(find_smollm2()), optimized=False)
    # It ends early, and how early depends on the CPU; so does where the two part, whose sums are in another order.
    assert found["alone"].startswith(" Paris.\n\nThe ")
    assert found["sharded"].startswith(" Paris.\n\nThe ")
    assert 0.125 <= found["share_per_device"] < 0.127  # only norms and row-parallel scales are replicated


@pytest.mark.parametrize("name", WITH_TOKENS)
def test_greedy_tokens(found, name):
    assert found[name]["greedy_sharded"] == found[name]["greedy"]


def test_greedy_tokens_with_an_int8_cache(found):
    assert found["llama"]["greedy_int8_cache_sharded"] == found["llama"]["greedy_int8_cache"]
    assert found["llama"]["compiled_late_int8_cache"] == 0


@pytest.mark.parametrize("name", WITH_TOKENS)
def test_the_loop_is_compiled_once(found, name):
    assert found[name]["compiled_late"] == 0


def test_saved_and_loaded_with_an_adapter(found):
    assert found["saved"]


def test_each_device_holds_about_its_share(found):
    assert found["llama"]["bytes_per_device"] < 0.3 * found["llama"]["bytes"]


@pytest.fixture(scope="module")
def exchanges():
    return run_on_eight_devices(Path(__file__).parent / "exchanges_of_decode.py")


@pytest.mark.parametrize("case", DEVICES)
def test_what_devices_exchange_for_a_token(exchanges, case):
    """Sums into the residual and what they need; no weights, no part of the cache, no activations."""
    expected = {
        ("embedding", "all-reduce", "add"): 1,  # each device has some of the vocabulary, zeros for other tokens
        ("sampling", "all-gather", None): 2,  # each device's most likely token, and its logit
    }
    for layer in range(LAYERS):
        for product in ("attention/out", "mlp/down"):
            # The contracted features are sharded: the scale of a row of x needs the maximum over all devices, and the
            # integers of all devices are summed up.
            expected[f"layers_{layer}/{product}", "all-reduce", "maximum"] = 1
            expected[f"layers_{layer}/{product}", "all-reduce", "add"] = 1
    if case == "rows_on_two_axes":
        expected["sampling", "all-reduce", "and"] = 1  # whether all rows have ended
    found = exchanges[case]["loop"]
    assert Counter((where, op, reduction) for where, op, reduction, _ in found) == expected
    gathered = [shapes for _, op, _, shapes in found if op == "all-gather"]
    rows, devices = ROWS[case], DEVICES[case]
    assert gathered == [[["f32", [rows, devices]]], [["s32", [rows, devices]]]]
    for where, op, reduction, shapes in found:
        if "/" in where and reduction == "add":
            assert {kind for kind, _ in shapes} == {"s32"}, (where, op)


@pytest.mark.parametrize("case", DEVICES)
def test_the_cache_is_updated_in_place(exchanges, case):
    assert exchanges[case]["donated_cache"] == 2 * LAYERS


def test_specs():
    params = jint8.load(DIRECTORY / "opt").params
    specs = partition_specs(params, AbstractMesh((2, 2), ("data", "model")))
    layer = specs["layers_0"]
    assert layer["attention"]["qkv"] == {"weight": P("model", None), "bias": P("model")}
    assert layer["attention"]["out"] == {"weight": P(None, "model"), "bias": P()}
    assert layer["mlp"]["down"]["weight"] == P(None, "model")
    assert specs["embedding"] == P("model")
    assert specs["positions"] == P()


def test_a_vocabulary_that_the_devices_do_not_divide_is_replicated():
    mesh = AbstractMesh((3,), ("model",))
    specs = partition_specs({"embedding": jax.ShapeDtypeStruct((128, 32), "float32")}, mesh)
    assert specs == {"embedding": P()}


def test_an_axis_that_the_mesh_has_not():
    with pytest.raises(ValueError, match="Expected a mesh with an axis 'model'"):
        partition_specs({}, AbstractMesh((2, 2), ("data", "tensor")))


def test_a_checkpoint_that_the_mesh_does_not_divide():
    with pytest.raises(ValueError, match=r"layers_0/attention/out/weight: Expected shape .* divided by 5 devices"):
        jint8.load(DIRECTORY / "llama", mesh=AbstractMesh((5,), ("model",)))
