import json

import pytest
from tiny_model import make_llama_directory

import jint8
from jint8.cli import _waiting, main


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return make_llama_directory(tmp_path_factory.mktemp("tiny") / "llama", seed=0)


@pytest.fixture(scope="session")
def model(llama):
    return jint8.load(llama, dtype="float32")


@pytest.fixture(scope="session")
def float_model(llama):
    return jint8.load(llama, dtype="float32", quantize=False)


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs a command in this process -> (status, standard output, standard error)."""
    monkeypatch.setenv("JINT8_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JINT8_DEBUG", raising=False)
    monkeypatch.setattr(_waiting, "LONG", 600.0)  # a busy machine isn't what is tested

    def run(*argv):
        capsys.readouterr()
        if argv[0] in ("demo", "generate", "eval", "outliers", "bench", "check"):
            argv = (*argv, "--no-compile-cache")
        status = main([str(arg) for arg in argv])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def run_json(run):
    """Runs a command that works, with --json -> the object."""

    def run_json(*argv):
        status, out, err = run(*argv, "--json")
        assert status == 0, err
        assert out.count("\n") == 1
        return json.loads(out)

    return run_json


@pytest.fixture
def run_error(run):
    """Runs a command that fails on bad input -> its one line on standard error."""

    def run_error(*argv):
        status, out, err = run(*argv)
        assert (status, out) == (2, "")
        lines = err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("jint8")
        assert "internal error" not in lines[0]
        return lines[0]

    return run_error
