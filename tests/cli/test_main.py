import os
import subprocess
import sys

import pytest

import jint8
from jint8.cli import _common, _eval, main
from jint8.cli._main import COMMANDS


def shell(*argv, **env):
    return subprocess.run(
        [sys.executable, "-m", "jint8", *map(str, argv)],
        capture_output=True,
        text=True,
        env=os.environ | env,
        check=False,
    )


def test_help_of_the_process():
    done = shell("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for command in COMMANDS:
        assert f"\n    {command} " in done.stdout


def test_bad_input_of_the_process(tmp_path):
    done = shell("generate", tmp_path / "none", "--prompt", "hi", "--no-compile-cache")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert str(tmp_path / "none") in done.stderr


def test_compiled_programs_are_kept(llama, tmp_path):
    argv = ("generate", llama, "--prompt", "hi", "--max-tokens", 2)
    first = shell(*argv, JINT8_CACHE=str(tmp_path))
    assert first.returncode == 0
    assert any((tmp_path / "compiled").iterdir())
    second = shell(*argv, JINT8_CACHE=str(tmp_path))
    assert (second.returncode, second.stdout) == (0, first.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "--json" in out
    assert "--scheme" in out or command in ("outliers", "bench", "fit")  # which don't choose one


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"jint8 {jint8.__version__}\n"


ARGUMENTS = {
    "no_command": (["--quiet"], "COMMAND"),
    "unknown_command": (["fly"], "'fly'"),
    "no_source": (["generate"], "SRC"),
    "no_prompt": (["generate", "x"], "--prompt"),
    "not_a_number": (["generate", "x", "--max-tokens", "many"], "'many'"),
    "unknown_option": (["eval", "x", "--text", "y", "--speed"], "--speed"),
    "no_text": (["eval", "x"], "--text --tokens"),
    "text_and_tokens": (["eval", "x", "--text", "y", "--tokens", "z"], "--tokens"),
    "unknown_scheme": (["eval", "x", "--text", "y", "--scheme", "int4"], "'int4'"),
    "negative_threshold": (["generate", "x", "--prompt", "y", "--threshold=-1"], "threshold"),
    "no_such_path": (["generate", "nowhere.gguf", "--prompt", "y"], "nowhere.gguf"),
    "dtype_no_float": (["quantize", "LLAMA", "DST", "--dtype", "int8"], "float"),
    "dtype_unknown": (["quantize", "LLAMA", "DST", "--dtype", "float33"], "float33"),
}


@pytest.mark.parametrize(("argv", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_bad_arguments(argv, message, llama, tmp_path, capsys):
    paths = {"LLAMA": str(llama), "DST": str(tmp_path / "dst")}
    assert main([paths.get(arg, arg) for arg in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert message in err
    assert "internal error" not in err
    assert not (tmp_path / "dst").exists()


def test_interrupted(monkeypatch, run):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(_eval, "run", interrupt)
    status, out, err = run("eval", "x", "--text", "y")
    assert (status, out, err) == (130, "", "jint8: interrupted\n")


BUGS = {
    "type": (TypeError("unsupported operand"), "internal error: TypeError: unsupported operand; JINT8_DEBUG=1"),
    "key": (KeyError("layers_0"), "internal error: KeyError: 'layers_0'; JINT8_DEBUG=1"),
    "value": (ValueError("shapes\n(2,) (3,)"), "internal error: ValueError: shapes (2,) (3,); JINT8_DEBUG=1"),
    "assertion": (AssertionError(), "internal error: AssertionError: ; JINT8_DEBUG=1"),
}
INPUT = {
    "type": TypeError("Expected integer tokens, got float32."),
    "value": ValueError("a.json: Expected JSON, got: nothing."),
    "not_implemented": NotImplementedError("Expected a CPU, got a toaster."),
    "file": FileNotFoundError("no such file"),
    "package": ImportError("pip install 'jint8[hf]'"),
}


def fail(monkeypatch, error):
    def run(args):
        raise error

    monkeypatch.setattr(_eval, "run", run)


@pytest.mark.parametrize(("error", "message"), BUGS.values(), ids=BUGS)
def test_a_bug_is_called_one(error, message, monkeypatch, run):
    fail(monkeypatch, error)
    status, out, err = run("eval", "x", "--text", "y")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"jint8: {message}")


@pytest.mark.parametrize("error", INPUT.values(), ids=INPUT)
def test_bad_input_is_not_called_a_bug(error, monkeypatch, run_error):
    fail(monkeypatch, error)
    assert run_error("eval", "x", "--text", "y") == f"jint8: {error}"


@pytest.mark.parametrize("error", [BUGS["key"][0], *INPUT.values()], ids=["bug", *INPUT])
def test_debugging_shows_the_traceback(error, monkeypatch, run):
    fail(monkeypatch, error)
    monkeypatch.setenv("JINT8_DEBUG", "1")
    with pytest.raises(type(error)) as raised:
        run("eval", "x", "--text", "y")
    assert raised.value is error


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory")], ids=["host", "xla"]
)
def test_too_little_memory_is_no_bug(error, monkeypatch, run_error):
    fail(monkeypatch, error)
    assert run_error("eval", "x", "--text", "y").startswith("jint8: out of memory:")


@pytest.mark.parametrize("value", ["", "0"])
def test_no_debugging(value, monkeypatch, run_error):
    fail(monkeypatch, INPUT["value"])
    monkeypatch.setenv("JINT8_DEBUG", value)
    assert run_error("eval", "x", "--text", "y") == "jint8: a.json: Expected JSON, got: nothing."


def test_traceback_of_the_process(tmp_path):
    done = shell("eval", tmp_path / "none", "--text", "y", "--no-compile-cache", JINT8_DEBUG="1")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):")


CACHES = {
    "own": ({"JINT8_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
    "xdg": ({"XDG_CACHE_HOME": "/b"}, "/b/jint8"),
    "home": ({"HOME": "/c"}, "/c/.cache/jint8"),
}


@pytest.mark.parametrize(("env", "expected"), CACHES.values(), ids=CACHES)
def test_cache_directory(env, expected, monkeypatch):
    for name in ("JINT8_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert _common.cache_directory().as_posix() == expected


def test_name_on_the_hub(llama, monkeypatch, run_json):
    asked = []
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda name, allow_patterns: asked.append(name) or str(llama))
    assert run_json("quantize", "owner/model", "dst", "--dry-run")["files"] == 0
    assert asked == ["owner/model"]


def test_hub_that_is_not_reached(monkeypatch, run_error):
    hub = pytest.importorskip("huggingface_hub")

    def offline(name, allow_patterns):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    error = run_error("quantize", "owner/model", "dst", "--dry-run", "--quiet")
    assert "'owner/model': no such path, and the hub says: no network" in error
