import dataclasses

import pytest

import jint8
from jint8._ops.cpu import native

TEXT = "Jackdaws love my big sphinx of quartz. " * 3
COUNT = 2 * 4  # layers, projections


def break_weight(source, target, path):
    """Saves the model with a weight whose scales are a tenth too large."""
    model = jint8.load(source, dtype="float32")
    *parents, last = path.split("/")
    node = model.params
    for parent in parents:
        node = node[parent]
    node[last] = dataclasses.replace(node[last], scale=node[last].scale * 1.1)
    jint8.save(target, model)
    return target


@pytest.mark.slow
def test_float_checkpoint(llama, model, run_json, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    got = run_json("check", llama, "--text", tmp_path / "text.txt", "--seq-len", 32, "--limit", 2)
    assert got["tokens"] == 64
    assert got["ran_int8"]
    assert got["weights_known"]
    assert len(got["products"]) == COUNT
    assert got["implementations"] == {"native" if native.by_default(32) else "XLA (xla_gather)": COUNT}
    assert 0 < got["error"] < 0.1
    assert all(0 < product["error"] < 0.05 for product in got["products"])
    assert got["skipped"].keys() == {"embedding", "lm_head/weight"}


@pytest.mark.slow
def test_a_broken_weight_is_named(llama, run_json, run, tmp_path):
    broken = break_weight(llama, tmp_path / "broken", "layers_1/mlp/down/weight")
    got = run_json("check", broken, "--float", llama, "--seq-len", 32)
    assert got["products"][0]["path"] == "layers_1/mlp/down/weight"
    assert 0.08 < got["products"][0]["error"] < 0.12
    assert got["products"][1]["error"] < 0.05
    status, out, _ = run("check", broken, "--float", llama, "--seq-len", 32, "--worst", 1)
    assert status == 0
    assert out.splitlines()[4].startswith("layers_1/mlp/down/weight ")
    assert f"and {COUNT - 1} more" in out


@pytest.mark.slow
def test_int8_without_its_float_checkpoint(llama, run_json, tmp_path):
    jint8.save(tmp_path / "int8", jint8.load(llama, dtype="float32"))
    got = run_json("check", tmp_path / "int8", "--seq-len", 32)
    assert not got["weights_known"]
    assert all(product["weight_error"] == 0 < product["error"] for product in got["products"])


def test_without_int8(llama, run_json):
    got = run_json("check", llama, "--scheme", "none", "--seq-len", 32)
    assert not got["ran_int8"]
    assert got["products"] == []
    assert "multiplied in floating point" in got["skipped"]["layers_0/mlp/down/weight"]


def test_bad_arguments(llama, run_error, tmp_path):
    assert "Expected --worst to be at least 1, got 0" in run_error("check", llama, "--worst", 0)
    (tmp_path / "text.txt").write_text("a")
    assert "at least 2 tokens" in run_error("check", llama, "--text", tmp_path / "text.txt")
