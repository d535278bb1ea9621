import json
import signal
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from checkpoint_files import safetensors_bytes
from family_files import DIRECTORY
from tiny_model import make_llama_directory

import jint8
from jint8.checkpoints import _directory, _jint8
from jint8.cli import _common

DOWN = "model.layers.1.mlp.down_proj.weight"
EMBEDDING, NORM = "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"


@pytest.fixture
def source(tmp_path):
    return make_llama_directory(tmp_path / "llama", seed=1)


def size(directory, pattern="*"):
    return sum(file.stat().st_size for file in directory.glob(pattern))


def test_json(source, tmp_path, run_json):
    got = run_json("quantize", source, tmp_path / "dst")
    assert got == {
        "files": len(list((tmp_path / "dst").iterdir())),
        "bytes_in": size(source, "*.safetensors"),
        "bytes_out": size(tmp_path / "dst"),
        "quantized": 8,
        "skipped": 7,
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name)
def test_saves_what_load_makes(dtype, tmp_path, run_json):
    source = make_llama_directory(tmp_path / "llama", seed=1, shards=3, dtype=dtype)
    run_json("quantize", source, tmp_path / "dst", "--threshold", 3, "--dtype", "bfloat16")
    expected = jint8.load(source, config=jint8.Config(threshold=3), dtype="bfloat16")
    got = jint8.load(tmp_path / "dst", verify=True)
    assert (got.quant, got.model) == (expected.quant, expected.model)
    jax.tree.map(np.testing.assert_array_equal, got.params, expected.params)


PATTERNS = {
    "skip": (["--skip", "mlp/down", "layers_0"], 3),
    "skip_by_their_name": (["--skip", "q_proj"], 6),
    "include_wins": (["--skip", "layers_*", "--include", "layers_1"], 4),
    "head": (["--include", "lm_head", "embedding"], 10),
    "none": (["--scheme", "none"], 0),
}


@pytest.mark.parametrize(("argv", "quantized"), PATTERNS.values(), ids=PATTERNS)
def test_patterns(argv, quantized, source, tmp_path, run_json):
    plan = run_json("quantize", source, tmp_path / "dst", *argv, "--dry-run")
    assert not (tmp_path / "dst").exists()
    got = run_json("quantize", source, tmp_path / "dst", *argv)
    assert (got["quantized"], got["skipped"]) == (quantized, 15 - quantized)
    assert (plan["quantized"], plan["skipped"], plan["files"]) == (quantized, 15 - quantized, 0)
    tensors = safetensors.numpy.load_file(tmp_path / "dst" / "model.safetensors")
    assert plan["bytes_out"] == sum(x.nbytes for x in tensors.values())
    assert sum(name.endswith("#q") for name in tensors) == quantized


def test_patterns_take_no_paths(source, tmp_path, run_json, run_error):
    """Each option takes one pattern, wherever it stands; several only behind both paths."""
    paths = (source, tmp_path / "dst")
    for argv in (
        ("--skip", "mlp/down", "--skip", "layers_0", *paths),
        (paths[0], "--skip", "mlp/down", paths[1], "--skip", "layers_0"),
        ("--skip=mlp/down", *paths, "--skip", "layers_0"),
        (*paths, "--json", "--skip", "mlp/down", "layers_0"),
    ):
        assert run_json("quantize", *argv, "--dry-run")["quantized"] == 3
    assert "unrecognized arguments: more" in run_error("quantize", "--skip", "mlp/down", *paths, "more")


def test_bitsandbytes(source, tmp_path, run_json, run_error):
    run_json("quantize", source, tmp_path / "dst", "--format", "bitsandbytes")
    assert DOWN.replace("weight", "SCB") in safetensors.numpy.load_file(tmp_path / "dst" / "model.safetensors")
    got, expected = jint8.load(tmp_path / "dst"), jint8.load(source)
    jax.tree.map(np.testing.assert_array_equal, got.params, expected.params)
    error = run_error("quantize", source, tmp_path / "no", "--format", "bitsandbytes", "--include", "embedding")
    assert "no int8 embeddings" in error
    assert not (tmp_path / "no").exists()


def test_int8_of_others(tmp_path, run, run_json, run_error):
    source, dst = DIRECTORY.parent / "int8" / "quark", tmp_path / "dst"
    stored = "int8 weights as quark stored them; activations in int8, a scale per token, "
    status, out, err = run("quantize", source, dst)
    assert status == 0
    assert f"{stored}no outliers split off (vector)\n" in err
    assert err.count("as quark stored") == 1
    assert "8 weights in int8, 8 parameters in floating point" in out
    tokens = ("--tokens", save_tokens(tmp_path))
    status, _, err = run("eval", source, *tokens, "--threshold", 4)
    assert status == 0
    assert f"{stored}outliers from 4 on in 16 bits (llm.int8)" in err
    # A model of ours has the config that it was saved with, whose scheme knows no threshold.
    assert "saved with the scheme 'vector'" in run_error("eval", dst, *tokens, "--threshold", 4)
    status, _, err = run("eval", dst, *tokens, "--scheme", "llm.int8", "--threshold", 4)
    assert (status, "stored them" in err) == (0, False)
    assert "stored them" in run("quantize", source, tmp_path / "no", "--dry-run")[2]
    assert not run("quantize", source, tmp_path / "no", "--dry-run", "--quiet")[2]
    error = run_error("eval", source, "--tokens", save_tokens(tmp_path), "--compare")
    assert "Expected a checkpoint in floating point for --compare, got int8" in error
    assert "got int8 of quark" in run_error("quantize", source, tmp_path / "no", "--skip", "mlp")


def save_tokens(directory):
    np.save(directory / "tokens.npy", np.arange(3, 23)[None])
    return directory / "tokens.npy"


def test_table(source, tmp_path, run):
    status, out, _ = run("quantize", source, tmp_path / "dst")
    assert status == 0
    assert "layers_*/mlp/down/weight" in out
    assert "8 weights in int8, 7 parameters in floating point" in out


def test_bfloat16_by_default_has_its_dtype(source, tmp_path, run_json):
    run_json("quantize", source, tmp_path / "dst", "--dtype", "bfloat16")
    assert jint8.load(tmp_path / "dst").params["norm"]["scale"].dtype == "bfloat16"
    assert jint8.load(tmp_path / "dst", dtype="float32").params["norm"]["scale"].dtype == "float32"


def rewrite(**changes):
    """A fault in the tensors; None removes one."""

    def fault(source):
        file = source / "model.safetensors"
        tensors = {name: x.copy() for name, x in safetensors.numpy.load_file(file).items()}
        for name, value in changes.items():
            name = name.replace("__", ".")
            tensors[name] = value(tensors.get(name)) if callable(value) else value
        file.write_bytes(safetensors_bytes({name: x for name, x in tensors.items() if x is not None}))

    return fault


def change(name, value):
    return rewrite(**{name.replace(".", "__"): value})


def put(value):
    def change(x):
        x[3, 5] = value
        return x

    return change


def configure(**changes):
    def fault(source):
        file = source / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return fault


def truncate(source):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


FAULTS = {
    "truncated": (truncate, ["model.safetensors", "truncated"]),
    "missing_tensor": (change(DOWN, None), [DOWN, "none of that name"]),
    "unknown_tensor": (change("model.extra", np.zeros(2, np.float32)), ["model.safetensors", "'model.extra'"]),
    "nan": (change(DOWN, put(np.nan)), ["model.safetensors", DOWN, "NaN"]),
    "infinity": (change(DOWN, put(-np.inf)), ["model.safetensors", DOWN, "infinity"]),
    "nan_in_the_embedding": (change(EMBEDDING, put(np.nan)), ["model.safetensors", EMBEDDING, "NaN"]),
    "infinity_in_a_norm": (change(NORM, lambda x: x * np.inf), ["model.safetensors", NORM, "infinity"]),
    "wrong_shape": (change(DOWN, lambda x: x[:, :-1]), ["model.safetensors", DOWN, "(32, 47)"]),
    "wrong_rows": (change(DOWN, lambda x: x[:-1]), ["model.safetensors", DOWN, "31"]),
    "wrong_rank": (change(DOWN, lambda x: x.reshape(-1)), ["model.safetensors", DOWN, "(1536,)"]),
    "integers": (change(DOWN, lambda x: x.astype(np.int32)), ["model.safetensors", DOWN, "int32"]),
    "architecture": (configure(model_type="mamba"), ["llama", "'mamba'"]),
    "impossible_size": (configure(num_attention_heads=5), ["llama", "5 attention heads"]),
    "no_config": (lambda source: (source / "config.json").unlink(), ["config.json"]),
    "damaged_tokenizer": (lambda source: (source / "tokenizer.json").write_text("{"), ["tokenizer.json"]),
}


@pytest.mark.parametrize(("fault", "words"), FAULTS.values(), ids=FAULTS)
def test_fault(fault, words, source, tmp_path, run_error):
    fault(source)
    error = run_error("quantize", source, tmp_path / "dst", "--quiet")
    assert all(word in error for word in words), error
    assert [p.name for p in tmp_path.iterdir()] == ["llama"]


@pytest.mark.parametrize("dry_run", [["--dry-run"], []], ids=["dry_run", "run"])
def test_something_at_the_destination(dry_run, source, tmp_path, run_error):
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "mine").touch()
    assert "dst: Expected nothing" in run_error("quantize", source, tmp_path / "dst", *dry_run)
    assert [p.name for p in (tmp_path / "dst").iterdir()] == ["mine"]
    assert "mine: Expected nothing" in run_error("quantize", source, tmp_path / "dst" / "mine", *dry_run)


def test_int8_is_not_quantized_again(source, tmp_path, run, run_error):
    run("quantize", source, tmp_path / "dst")
    error = run_error("quantize", tmp_path / "dst", tmp_path / "again")
    assert "one that jint8 wrote" in error
    assert "use it as it is, or quantize the one that it was made from" in error


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (OSError("disk full"), 2)], ids=["^C", "disk"])
@pytest.mark.parametrize("function", ["_save_arrays", "write_json", "sha256", "_sync"])
def test_interrupted_save_leaves_nothing(function, error, status, source, tmp_path, monkeypatch, run):
    def fail(*args):
        raise error

    monkeypatch.setattr(_jint8 if function == "write_json" else _directory, function, fail)
    assert run("quantize", source, tmp_path / "dst", "--quiet")[0] == status
    assert [p.name for p in tmp_path.iterdir()] == ["llama"]


def test_interrupted_after_the_save(source, tmp_path, monkeypatch, run):
    """DST is there: whoever asks by the status has to know."""

    def interrupt(count):
        raise KeyboardInterrupt

    monkeypatch.setattr(_common, "megabytes", interrupt)
    status, _, err = run("quantize", source, tmp_path / "dst")
    assert (status, err) == (0, "")
    jint8.load(tmp_path / "dst", verify=True)


KILLED = """
import os, signal, sys
from jint8.checkpoints import _directory
from jint8.cli import main
setattr(_directory, sys.argv[1], lambda *args: os.kill(os.getpid(), signal.SIGKILL))
main(["quantize", *sys.argv[2:]])
"""


@pytest.mark.first_case
@pytest.mark.parametrize("function", ["_save_arrays", "_sync"])
def test_a_killed_run_is_in_nobodys_way(function, source, tmp_path, run):
    """Whoever is killed can't tidy up: what is left is hidden and has another name."""
    argv = [sys.executable, "-c", KILLED, function, source, tmp_path / "dst"]
    assert subprocess.run(argv, check=False).returncode == -signal.SIGKILL
    (left,) = (path.name for path in tmp_path.iterdir() if path != source)
    assert left.startswith(".dst.")
    assert left.endswith(".partial")
    assert run("quantize", source, tmp_path / "dst", "--quiet")[0] == 0
    jint8.load(tmp_path / "dst", verify=True)


def test_full_disk(source, tmp_path, run_error):
    """A limit on the size of files fails in the same call as a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        error = run_error("quantize", source, tmp_path / "dst", "--quiet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "model.safetensors" in error
    assert [p.name for p in tmp_path.iterdir()] == ["llama"]


def test_missing_shard(tmp_path, run_error):
    source = make_llama_directory(tmp_path / "llama", seed=1, shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    error = run_error("quantize", source, tmp_path / "dst", "--quiet")
    assert "model-00002-of-00003.safetensors: Expected this file" in error
    assert [p.name for p in tmp_path.iterdir()] == ["llama"]
