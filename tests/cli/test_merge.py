"""`jint8 merge`."""

import shutil

import numpy as np
import pytest
from family_files import DIRECTORY, expected

import jint8

ADAPTER = DIRECTORY.parent / "adapters" / "llama"


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    path = tmp_path_factory.mktemp("merge") / "int8"
    jint8.save(path, jint8.load(DIRECTORY / "llama"))
    return path


@pytest.mark.parametrize("format", ["jint8", "bitsandbytes"])
def test_into_int8(format, int8, run_json, tmp_path):
    found = run_json("merge", int8, ADAPTER, tmp_path / "merged", "--format", format)
    assert found["files"] == len(list((tmp_path / "merged").iterdir()))
    assert 0 < max(found["errors"].values()) < 0.02
    want = np.load(ADAPTER / "expected.npz")["logits"]
    model = jint8.load(tmp_path / "merged", dtype="float32")
    got = np.asarray(model.logits(expected("llama")["tokens"]))
    assert np.linalg.norm(got - want) < 0.07 * np.linalg.norm(want)


def test_as_text(int8, run, tmp_path):
    status, out, _ = run("merge", int8, ADAPTER, tmp_path / "merged")
    assert status == 0
    assert "weights merged, relative error at most 0.0" in out
    assert "layers_" in out


def test_faults(int8, run_error, tmp_path):
    assert "got no adapter_config.json" in run_error("merge", int8, tmp_path, tmp_path / "merged")
    broken = shutil.copytree(ADAPTER, tmp_path / "adapter")
    (broken / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in run_error("merge", int8, broken, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
