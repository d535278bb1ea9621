import os
import subprocess
import sys

import pytest
from family_files import DIRECTORY

import jint8
from jint8._core.config import OUTLIER_MODES, PRESETS, SCHEMES
from jint8.cli import _common, _eval, main
from jint8.cli._compile_cache import SUFFIX, Programs
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


def test_a_warning_of_the_process_is_one_line(tmp_path):
    """Of a checkpoint that keeps a projection in floating point, said once though the files are looked at twice."""
    (tmp_path / "model.safetensors").write_bytes((DIRECTORY / "gpt2" / "model.safetensors").read_bytes())
    options = (DIRECTORY.parent / "bitsandbytes" / "gpt2" / "config.json").read_text()
    (tmp_path / "config.json").write_text(options)
    done = shell("quantize", tmp_path, tmp_path / "int8")
    assert done.returncode == 0
    (line,) = [line for line in done.stderr.splitlines() if "warning" in line.lower()]
    assert line.startswith(
        f"jint8: warning: {tmp_path}: these weights stay in floating point: layers_1/mlp/up/weight: "
    )


@pytest.mark.slow
def test_compiled_programs_are_kept(llama, tmp_path):
    argv = ("generate", llama, "--prompt", "hi", "--max-tokens", 2)
    first = shell(*argv, JINT8_CACHE=str(tmp_path))
    assert first.returncode == 0
    programs = Programs(tmp_path / "compiled", print)
    keys = [file.name.removesuffix(SUFFIX) for file in (tmp_path / "compiled").iterdir()]
    assert all(map(programs.get, keys))
    for key in keys:  # as a full disk cuts them
        file = tmp_path / "compiled" / (key + SUFFIX)
        file.write_bytes(file.read_bytes()[:-9])
    second = shell(*argv, JINT8_CACHE=str(tmp_path))
    assert (second.returncode, second.stdout) == (0, first.stdout)
    assert "Warning" not in second.stderr
    assert all(map(programs.get, keys))


@pytest.mark.slow
def test_two_processes_with_one_cache(llama, tmp_path):
    argv = [sys.executable, "-m", "jint8", "generate", llama, "--prompt", "hi", "--max-tokens", "2"]
    env = os.environ | {"JINT8_CACHE": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    both = [subprocess.Popen(list(map(str, argv)), **pipes) for _ in range(2)]
    (first, first_err), (second, second_err) = (process.communicate() for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert first == second
    assert "kept:" not in first_err + second_err
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "--json" in out
    assert "--scheme" in out or command in ("outliers", "bench", "fit", "merge")  # which don't choose one


def test_nothing_is_asked(capsys):
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: jint8")
    assert all(command in out for command in COMMANDS)
    assert err == ""


@pytest.mark.parametrize("command", ["generate", "eval", "quantize", "bench", "demo", "fit"])
def test_help_has_all_names(command, capsys):
    main([command, "--help"])
    out = " ".join(capsys.readouterr().out.split())
    for names in (SCHEMES, PRESETS, OUTLIER_MODES):
        assert ", ".join(names) in out


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
    "unknown_scheme": (["eval", "x", "--text", "y", "--scheme", "int3"], "'int3'"),
    "negative_threshold": (["generate", "x", "--prompt", "y", "--threshold=-1"], "threshold"),
    "no_such_path": (["generate", "nowhere.gguf", "--prompt", "y"], "nowhere.gguf"),
    "dtype_no_float": (["quantize", "LLAMA", "DST", "--dtype", "int8"], "float"),
    "dtype_unknown": (["quantize", "LLAMA", "DST", "--dtype", "float33"], "float33"),
}


# Said before anything is loaded: there is no model at SRC. TEXT is one, PLACE a directory.
FIRST = {
    "no_tokens": ("generate SRC --prompt x --max-tokens 0", "--max-tokens to be at least 1, got 0"),
    "temperature": ("generate SRC --prompt x --temperature nan", "temperature"),
    "temperature_of_the_demo": ("demo --temperature inf", "temperature"),
    "top_p": ("generate SRC --prompt x --top-p 2", "top_p"),
    "top_k": ("generate SRC --chat --top-k=-1", "top_k"),
    "stop": ("generate SRC --prompt x --stop=", "stop"),
    "bytes_of_the_prompt": ("generate SRC --prompt \udcff", "--prompt: Expected a text in UTF-8"),
    "bytes_of_the_system_message": ("generate SRC --chat --system \udcff", "--system: Expected a text in UTF-8"),
    "prompt_file": ("generate SRC --prompt-file PLACE/none", "none"),
    "warm": ("generate SRC --prompt x --warm", "Expected --warm with a conversation"),
    "adapter": ("generate SRC --prompt x --adapter PLACE", "Expected a LoRA adapter that PEFT saved"),
    "dtype": ("generate SRC --prompt x --dtype int8", "--dtype"),
    "calibrate": ("generate SRC --prompt x --preset static --calibrate PLACE/none", "none"),
    "calibrate_what": ("eval SRC --text TEXT --calibrate TEXT", "Expected --calibrate with what is calibrated"),
    "threshold": ("eval SRC --text TEXT --threshold nan", "threshold"),
    "text": ("eval SRC --text PLACE/none", "none"),
    "seq_len": ("eval SRC --text TEXT --seq-len 1", "--seq-len to be at least 2, got 1"),
    "batch_size": ("eval SRC --text TEXT --batch-size 0", "--batch-size to be at least 1, got 0"),
    "limit": ("eval SRC --text TEXT --limit 0", "--limit to be at least 1, got 0"),
    "tokens": ("eval SRC --tokens TEXT", "Expected a .npy file of token ids"),
    "outliers_text": ("outliers SRC --text PLACE/none", "none"),
    "outliers_seq_len": ("outliers SRC --seq-len 0", "--seq-len to be at least 2, got 0"),
    "outliers_threshold": ("outliers SRC --threshold=-1", "threshold"),
    "layer_share": ("outliers SRC --layer-share 2", "layer_share"),
    "position_share": ("outliers SRC --position-share nan", "position_share"),
    "outliers_dtype": ("outliers SRC --dtype float33", "--dtype"),
    "plot": ("outliers SRC --plot PLACE/none/x.png", "x.png: Expected a directory to write to, got no"),
    "plot_suffix": ("outliers SRC --plot PLACE/x.gif", "Expected a name that ends in .png, .svg, .pdf"),
    "magnitudes": ("outliers SRC --plot-magnitudes PLACE/none/x.svg", "Expected a directory to write to"),
    "html": ("outliers SRC --html PLACE", "Expected the name of a file to write, got a directory"),
    "generate_batch_size": ("generate SRC --prompt x --batch-size 0", "--batch-size to be at least 1, got 0"),
    "batches_of_a_conversation": ("generate SRC --chat --batch-size 2", "Expected --batch-size with a --prompt"),
    "outliers_batch_size": ("outliers SRC --batch-size 0", "--batch-size to be at least 1, got 0"),
    "fit_batch_size": ("fit SRC --mesh 8x24GiB --batch-size 0", "--batch-size to be at least 1, got 0"),
    "fit_batch": ("fit SRC --mesh 8x24GiB --batch 0", "--batch-size to be at least 1, got 0"),
    "prompt_tokens": ("bench SRC --prompt-tokens 0", "--prompt-tokens"),
    "bench_batch_size": ("bench SRC --batch-size 4 --batch-size 0", "--batch-size"),
    "repeats": ("bench SRC --repeats 0", "--repeats"),
    "context": ("fit SRC --mesh 8x24GiB --context 0", "--context"),
    "fit_threshold": ("fit SRC --mesh 8x24GiB --threshold=-1", "threshold"),
}


@pytest.mark.parametrize(("argv", "message"), FIRST.values(), ids=FIRST)
def test_arguments_come_before_the_model(argv, message, tmp_path, run_error):
    (tmp_path / "text.txt").write_text("a text")
    names = {"PLACE": str(tmp_path), "TEXT": str(tmp_path / "text.txt"), "SRC": str(tmp_path / "no_model")}
    for name, value in names.items():
        argv = argv.replace(name, value)
    error = run_error(*argv.split())
    assert message in error
    assert "no_model" not in error


@pytest.mark.parametrize("option", ["--plot", "--plot-magnitudes", "--html"])
def test_no_matplotlib(option, tmp_path, monkeypatch, run_error):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "jint8[plots]" in run_error("outliers", tmp_path / "no_model", option, tmp_path / "x.svg")


@pytest.mark.parametrize("there", [False, True])
def test_a_plot_that_cannot_be_written(there, tmp_path, monkeypatch, run_error):
    """Nor is anything written by finding that out."""
    if there:
        (tmp_path / "x.svg").touch()
    monkeypatch.setattr(_common.os, "access", lambda path, mode: False)
    error = run_error("outliers", tmp_path / "no_model", "--plot", tmp_path / "x.svg")
    assert "x.svg: Expected a file that can be written" in error
    assert (tmp_path / "x.svg").exists() == there


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


def test_near_misses_of_paths(llama, tmp_path, run_error):
    (tmp_path / "Model-int8").symlink_to(llama)
    (tmp_path / "other.gguf").touch()
    error = run_error("generate", tmp_path / "model-int", "--prompt", "a")
    assert error.endswith(f"got '{tmp_path / 'model-int'}': no such path; did you mean Model-int8?")
    assert error == run_error("generate", tmp_path / "model-in8", "--prompt", "a").replace("model-in8", "model-int")
    assert "did you mean other.gguf?" in run_error("generate", tmp_path / "othr.gguf", "--prompt", "a")
    assert "did you mean Model-int8?" in run_error("fit", tmp_path / "model-in8", "--mesh", "1x1GiB")
    assert "did you mean" not in run_error("generate", tmp_path / "something", "--prompt", "a")
    assert "did you mean" not in run_error("generate", tmp_path / "none" / "something", "--prompt", "a")


def test_hub_that_is_not_reached(monkeypatch, run_error):
    hub = pytest.importorskip("huggingface_hub")

    def offline(name, allow_patterns):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    error = run_error("quantize", "owner/model", "dst", "--dry-run", "--quiet")
    assert "'owner/model': no such path, and the hub says: no network" in error
