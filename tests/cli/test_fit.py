"""`jint8 fit`: what it says of a small model, against all of it compiled, loaded and counted."""

import math
from pathlib import Path

import jax
import pytest
from family_files import DIRECTORY
from virtual_devices import run_on_eight_devices

from jint8._convert.targets import abstract_float_params
from jint8._inference.capacity import known_models, longest_context, model_mesh
from jint8._inference.collectives import KINDS
from jint8.cli import _fit
from jint8.models import Decoder, model_config


@pytest.mark.parametrize(
    ("text", "devices", "memory"),
    [("8x24GiB", 8, 24 * 2**30), ("1x80GB", 1, 80 * 10**9), ("16x0.5MiB", 16, 2**19)],
)
def test_mesh(text, devices, memory):
    assert _fit.parse_mesh(text) == (devices, memory)


ERRORS = {
    "unknown": (["gpt-5", "--mesh", "8x24GiB"], "one of opt-175b, bloom-176b, llama-3-8b"),
    "near_miss": (["opt-175", "--mesh", "8x24GiB"], "got 'opt-175'; did you mean opt-175b?"),
    "capitals": (["Llama-3-8B", "--mesh", "8x24GiB"], "did you mean llama-3-8b?"),
    "several": (["gemma-27b", "--mesh", "8x24GiB"], "did you mean gemma-3-27b or gemma-2-27b?"),
    "no_devices": (["opt-175b", "--mesh", "0x24GiB"], "like 8x24GiB, of 1 to 1024 devices, got '0x24GiB'"),
    "no_unit": (["opt-175b", "--mesh", "8x24"], "8x24 to be like 24GiB (MB, GB, MiB, GiB), got '24'"),
    "no_mesh": (["opt-175b"], "--mesh"),
    "word": (["opt-175b", "--mesh", "eight"], "got 'eight'"),
    "reserve": (["opt-175b", "--mesh", "8x24GiB", "--reserve", "10%"], "--reserve to be like 24GiB"),
    "context": (["opt-175b", "--mesh", "1x24GiB", "--context", "0"], "--context to be at least 1"),
    "positions": (
        ["opt-175b", "--mesh", "1x24GiB", "--context", "2049"],
        "at most 2048, which the model has positions",
    ),
    "family": ([str(DIRECTORY.parent / "encoders" / "bert"), "--mesh", "1x24GiB"], "Expected a decoder"),
    "dtype": (
        ["opt-175b", "--mesh", "1x24GiB", "--dtype", "int8"],
        "--dtype to be a float type, such as float32 or bfloat16, got 'int8'",
    ),
}


@pytest.mark.parametrize(("argv", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(argv, message, run_error):
    assert message in run_error("fit", *argv)


PARAMETERS = {  # billions, as published
    "opt-175b": 175,
    "bloom-176b": 176.2,
    "llama-3-8b": 8.03,
    "llama-3-70b": 70.6,
    "llama-3-405b": 405.9,
    "mixtral-8x7b": 46.7,
    "gemma-2-27b": 27.2,
    "gemma-3-27b": 27.0,
    "smollm2-135m": 0.1345,
}


@pytest.mark.parametrize("name", known_models())
def test_known_sizes_have_as_many_parameters_as_published(name):
    leaves = abstract_float_params(Decoder(model_config(known_models()[name]["config"])))
    count = sum(math.prod(leaf.shape) for leaf in leaves.values())
    assert count / 1e9 == pytest.approx(PARAMETERS[name], rel=0.005)


LINEAR, WITH_A_STEP = (lambda n: 1000 + 8 * n), (lambda n: 1000 + 8 * n + (50_000 if n > 1024 else 0))


@pytest.mark.parametrize(
    ("needed", "room", "limit", "longest"),
    [
        (LINEAR, 1000 + 8 * 5000, 2**20, 4992),
        (LINEAR, 1000 + 8 * 5120, 2**20, 5120),
        (LINEAR, 10**9, 2050, 2050),
        (LINEAR, 10**9, 64, 64),
        (LINEAR, 1000, 2**20, 0),
        (LINEAR, 1000 + 8 * 130, 2**20, 128),
        (WITH_A_STEP, 1000 + 8 * 5000, 2**20, 1024),
        (WITH_A_STEP, 51_000 + 8 * 5000, 2**20, 4992),
        (lambda n: 7, 7, 4096, 4096),
    ],
    ids=["between", "exact", "limit", "short", "none", "least", "before_a_step", "behind_a_step", "constant"],
)
def test_longest_context(needed, room, limit, longest):
    looked_at = []
    assert longest_context(lambda n: looked_at.append(n) or needed(n), room, limit, 512) == longest
    assert len({*looked_at}) <= 10  # each is compiled


@pytest.fixture(scope="module")
def found():
    return run_on_eight_devices(Path(__file__).parents[1] / "inference" / "capacity_on_a_mesh.py", optimized=False)


@pytest.mark.slow
def test_one_and_two_layers_say_what_three_take(found):
    int8, full = found["fit"]["per_device"]["int8"], found["full"]
    for temporaries in ("prefill", "decode"):
        assert int8[temporaries] == pytest.approx(full[temporaries], rel=0.05)
    assert int8["cache"] == full["cache"]
    of_full = [
        {"kind": kind, "count": full[f"token {kind}"], "bytes": full[f"token {kind} bytes"], "per": "token"}
        for kind in KINDS
        if f"token {kind}" in full
    ]
    assert found["fit"]["collectives"] == of_full
    assert full["token all-reduce"] >= 2 * 3  # of the row-parallel products in each layer


@pytest.mark.slow
def test_weights_and_cache_are_what_the_program_takes(found):
    int8 = found["fit"]["per_device"]["int8"]
    tokens, rest = 4 * 128, 64  # and counters, the key and the end
    assert 0 < found["full"]["arguments"] - int8["weights"] - int8["cache"] - tokens < rest
    assert int8["weights"] == sum(int8[name] for name in ("projections", "scales", "embeddings", "others"))


@pytest.mark.slow
def test_cache_and_verdicts(found):
    fit = found["fit"]
    int8 = fit["per_device"]["int8"]
    assert int8["cache"] == 3 * 2 * 128 * 2 * 8 * 4  # layers, keys and values, slots, 2 of 4 heads of 8, float32
    assert int8["needed"] == int8["weights"] + int8["cache"] + max(int8["prefill"], int8["decode"])
    assert fit["fits"] is (int8["needed"] <= fit["memory"] - fit["reserve"])
    assert (fit["longest_context"], fit["longest_by"]) == (48, "positions")


def test_devices_that_do_not_divide_the_heads():
    config = model_config(known_models()["smollm2-135m"]["config"])
    with pytest.raises(ValueError, match="Expected a number of devices that divides the model's 9 heads, got 8"):
        model_mesh(config, 8)


def test_more_devices_than_jax_has_started_with(run_error):
    jax.devices()
    assert "Expected a process in which JAX hasn't started" in run_error("fit", "opt-175b", "--mesh", "8x24GiB")


def test_the_old_name_says_the_new_one(run, monkeypatch):
    found = {"fits": True}
    monkeypatch.setattr(_fit, "use_cpu_devices", lambda count: None)
    monkeypatch.setattr(_fit, "fit", lambda args, *_: found)
    argv = ("opt-175b", "--mesh", "8x24GiB", "--json")
    assert run("fit", *argv) == (0, '{"fits": true}\n', "")
    assert run("plan", *argv) == (0, '{"fits": true}\n', "jint8: the command plan is called fit now\n")
    assert run("plan", *argv, "--quiet") == (0, '{"fits": true}\n', "")


def test_errors_of_the_old_name(run_error):
    assert run_error("plan", "opt-175b", "--mesh", "eight").endswith("got 'eight'")


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "bits"), [("llm.int8", "int8"), ("int4", "4 bits"), ("int4-a8", "4 bits")])
def test_the_table_says_how_many_bits(found, scheme, bits, capsys):
    assert found["fit"]["scheme"] == "llm.int8"
    _fit.print_table(found["fit"] | {"scheme": scheme})
    assert f"projections, {bits} " in capsys.readouterr().out
