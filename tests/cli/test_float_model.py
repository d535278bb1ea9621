"""`--float PATH` of eval and bench: the model in floating point that int8 weights are compared with."""

import numpy as np
import pytest
import tiny_model
from tiny_model import make_llama_directory

import jint8

SMALL = ("--prompt-tokens", 8, "--new-tokens", 3, "--repeats", 1, "--batch-size", 1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, model):
    directory = tmp_path_factory.mktemp("saved") / "int8"
    jint8.save(directory, model)
    return directory


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokens") / "t.npy"
    np.save(file, np.random.default_rng(0).integers(0, 259, (3, 16)))
    return file


def test_eval(llama, saved, tokens, run_json):
    before = run_json("eval", llama, "--tokens", tokens, "--compare")
    assert before["kl"] > 0
    for argv in (["--compare"], []):  # which --float implies
        after = run_json("eval", saved, "--tokens", tokens, "--float", llama, *argv)
        assert after | {"seconds": 0} == before | {"seconds": 0}


def test_eval_of_what_bitsandbytes_stores(llama, model, tmp_path, tokens, run_json, run_error):
    jint8.save(tmp_path / "bnb", model, format="bitsandbytes")
    got = run_json("eval", tmp_path / "bnb", "--tokens", tokens, "--float", llama)
    assert got["kl"] == pytest.approx(run_json("eval", llama, "--tokens", tokens, "--compare")["kl"], rel=1e-3)
    assert "for --compare, got int8: give the one" in run_error(
        "eval", tmp_path / "bnb", "--tokens", tokens, "--compare"
    )


def test_floats_that_jint8_saved(llama, saved, float_model, tmp_path, tokens, run_json):
    jint8.save(tmp_path / "float", float_model)
    expected = run_json("eval", llama, "--tokens", tokens, "--compare")
    got = run_json("eval", saved, "--tokens", tokens, "--float", tmp_path / "float")
    assert got | {"seconds": 0} == expected | {"seconds": 0}
    assert run_json("eval", tmp_path / "float", "--tokens", tokens, "--compare")["kl"] == 0


def test_two_models_in_floating_point(llama, tmp_path, tokens, run_json):
    """Of which one isn't quantized either: how far the same sizes with other weights are."""
    other = make_llama_directory(tmp_path / "other", seed=1)
    got = run_json("eval", llama, "--tokens", tokens, "--scheme", "none", "--float", other)
    assert got["float_perplexity"] == run_json("eval", other, "--tokens", tokens, "--scheme", "none")["perplexity"]
    assert got["kl"] > 0.01


def test_sums_are_those_of_the_model(llama, saved, tokens, run_json):
    """The checkpoint in floating point has none."""
    run_json("eval", saved, "--tokens", tokens, "--float", llama, "--verify")


@pytest.mark.slow
def test_dtype_is_that_of_the_model(llama, tmp_path, run_json):
    jint8.save(tmp_path / "int8", jint8.load(llama, dtype="bfloat16"))
    got = run_json("bench", tmp_path / "int8", "--float", llama, *SMALL)
    floats = jint8.load(llama, dtype="bfloat16", quantize=False)
    assert got["weight_bytes"]["float"] == jint8.memory_report(floats.params).bytes


@pytest.mark.slow
def test_bench(llama, saved, model, float_model, run_json):
    got = run_json("bench", saved, "--float", llama, *SMALL)
    bytes_of = {kind: jint8.memory_report(m.params).bytes for kind, m in (("int8", model), ("float", float_model))}
    assert got["weight_bytes"] == bytes_of
    assert got["decode_tokens_per_s"]["float"] > 0


COMMANDS = {"eval": ("--tokens", "TOKENS"), "bench": SMALL}


@pytest.mark.parametrize("command", COMMANDS)
def test_refused(command, saved, tokens, tmp_path, run_error):
    options = [tokens if option == "TOKENS" else option for option in COMMANDS[command]]
    compare = ["--compare"] if command == "eval" else []
    assert "got one that jint8 saved: give the one that it was made from as --float PATH" in run_error(
        command, saved, *options, *compare
    )
    error = run_error(command, saved, *options, "--float", saved)
    assert "in floating point for --float, got one that jint8 saved: give the one that it was made from" in error
    assert "none" in run_error(command, saved, *options, "--float", tmp_path / "none")


def test_another_model(saved, tokens, tmp_path, run_error, monkeypatch):
    monkeypatch.setattr(tiny_model, "CONFIG", tiny_model.CONFIG | {"num_hidden_layers": 1})
    other = make_llama_directory(tmp_path / "other", seed=0)
    error = run_error("eval", saved, "--tokens", tokens, "--float", other)
    assert (
        f"{other}: Expected the model that SRC was made from, of which layers_1/attention/out/weight is (32, 32)"
        in error
    )
    assert "got one where it is not there" in error
    monkeypatch.setattr(tiny_model, "CONFIG", tiny_model.CONFIG | {"num_hidden_layers": 2, "intermediate_size": 64})
    other = make_llama_directory(tmp_path / "wider", seed=0)
    error = run_error("eval", saved, "--tokens", tokens, "--float", other)
    assert "layers_0/mlp/down/weight is (32, 48), got one where it is (32, 64)" in error


def test_an_own_head_is_no_other_model(tmp_path, tokens, run_json):
    """A file with a head of its own, as some converters write it for a model that has none."""
    tied = make_llama_directory(tmp_path / "tied", seed=0, tie=True)
    own = make_llama_directory(tmp_path / "own", seed=0)
    assert run_json("eval", own, "--tokens", tokens, "--float", tied)["kl"] > 0
