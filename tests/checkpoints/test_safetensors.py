"""Hugging Face directories: tensors from one file or many, and damaged ones."""

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from checkpoint_files import safetensors_bytes, write_directory

from jint8.checkpoints import open_checkpoint

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def shards(rng):
    make = lambda *shape: rng.standard_normal(shape, np.float32)
    return {FIRST: {"a": make(6, 4), "b": make(3)}, SECOND: {"c": make(2, 3, 4)}}


@pytest.mark.parametrize(
    "dtype",
    ["float64", "float32", "float16", ml_dtypes.bfloat16, "int64", "int32", "int16", "int8", "uint8", "bool"],
    ids=lambda d: np.dtype(d).name,
)
def test_values_as_stored(tmp_path, rng, dtype):
    x = (10 * rng.standard_normal((5, 3))).astype(dtype)
    with open_checkpoint(write_directory(tmp_path, {"model.safetensors": {"w": x}})) as ckpt:
        got, rows = ckpt.read("w"), ckpt.read_rows("w", 1, 4)
        info = ckpt.tensors["w"]
    assert got.dtype == x.dtype
    assert (info.shape, info.nbytes, info.size) == ((5, 3), x.nbytes, 15)
    np.testing.assert_array_equal(got, x)
    np.testing.assert_array_equal(rows, x[1:4])


def test_reads_what_the_reference_writes(tmp_path, rng):
    tensors = {"w": rng.standard_normal((4, 3), np.float32), "i": np.arange(5, dtype=np.int8)}
    write_directory(tmp_path, {})
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "np"})
    ckpt = open_checkpoint(str(tmp_path))
    for name, x in tensors.items():
        np.testing.assert_array_equal(ckpt.read(name), x)


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (4, 0), (1,)], ids=str)
def test_shapes(tmp_path, shape):
    x = np.ones(shape, np.float32)
    ckpt = open_checkpoint(write_directory(tmp_path, {"model.safetensors": {"w": x, "z": np.ones(3, np.int8)}}))
    assert ckpt.read("w").shape == shape
    np.testing.assert_array_equal(ckpt.read("w"), x)
    np.testing.assert_array_equal(ckpt.read("z"), np.ones(3))


@pytest.mark.parametrize("index", [True, False], ids=["index", "no_index"])
def test_shards(tmp_path, shards, index):
    with open_checkpoint(write_directory(tmp_path, shards, index=index)) as ckpt:
        assert ckpt.format == "safetensors"
        assert list(ckpt.tensors) == ["a", "b", "c"]
        assert ckpt.tensors["c"].file == tmp_path / SECOND
        assert ckpt.file_bytes == sum((tmp_path / f).stat().st_size for f in shards)
        for tensors in shards.values():
            for name, x in tensors.items():
                np.testing.assert_array_equal(ckpt.read(name), x)


def test_values_are_in_memory_of_their_own(tmp_path, shards):
    with open_checkpoint(write_directory(tmp_path, shards)) as ckpt:
        x = ckpt.read("a")
    os.truncate(tmp_path / FIRST, 0)  # which would kill a process that had mapped the file
    np.testing.assert_array_equal(x, shards[FIRST]["a"])
    assert x.ctypes.data % 64 == 0  # memory that JAX takes over


def test_closed(tmp_path, shards):
    with open_checkpoint(write_directory(tmp_path, shards)) as ckpt:
        pass
    with pytest.raises(ValueError, match="closed"):
        ckpt.read("a")


def test_config(tmp_path, shards):
    config = {"model_type": "llama", "rope_scaling": None}
    assert open_checkpoint(write_directory(tmp_path, shards, config=config)).config == config


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 7), (3, 2)], ids=["negative", "past_end", "reversed"])
def test_rows_outside(tmp_path, shards, start, stop):
    ckpt = open_checkpoint(write_directory(tmp_path, shards))
    with pytest.raises(ValueError, match=r"'a': Expected rows within"):
        ckpt.read_rows("a", start, stop)


def test_unknown_name(tmp_path, shards):
    with pytest.raises(KeyError, match="Expected one of 3 tensors, got 'x'"):
        open_checkpoint(write_directory(tmp_path, shards)).read("x")


def cut(n):
    return lambda d: (d / SECOND).write_bytes((d / SECOND).read_bytes()[:n])


def edit_index(**changes):
    def fault(d):
        file = d / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        index["weight_map"] = {k: v for k, v in (index["weight_map"] | changes).items() if v}
        file.write_text(json.dumps(index))

    return fault


def entry(**changes):
    def fault(d):
        x = np.zeros((2, 3, 4), np.float32)
        good = {"dtype": "F32", "shape": [2, 3, 4], "data_offsets": [0, 96]}
        (d / SECOND).write_bytes(safetensors_bytes({"c": x}, c=good | changes))

    return fault


FAULTS = {
    "missing_shard": (lambda d: (d / SECOND).unlink(), FileNotFoundError, SECOND),
    "missing_config": (lambda d: (d / "config.json").unlink(), FileNotFoundError, r"config\.json"),
    "config_not_json": (lambda d: (d / "config.json").write_text("{"), ValueError, r"config\.json: Expected JSON"),
    "config_not_object": (lambda d: (d / "config.json").write_text("[]"), ValueError, r"JSON object, got list"),
    "empty_file": (cut(0), ValueError, rf"{SECOND}.*truncated"),
    "truncated_header": (cut(20), ValueError, rf"{SECOND}.*truncated"),
    "truncated_data": (cut(-1), ValueError, rf"{SECOND}: tensor 'c'.*truncated"),
    "trailing_bytes": (
        lambda d: (d / SECOND).write_bytes((d / SECOND).read_bytes() + b"x"), ValueError, "belong to no tensor",
    ),
    "header_not_json": (
        lambda d: (d / SECOND).write_bytes(struct.pack("<Q", 4) + b"{{{{"), ValueError, f"{SECOND}.*doesn't parse",
    ),
    "not_safetensors": (lambda d: (d / SECOND).write_bytes(b"GGUF" * 99), ValueError, f"{SECOND}.*not safetensors"),
    "float8": (entry(dtype="F8_E4M3", data_offsets=[0, 24]), ValueError, "'c': Expected a type among .* got F8_E4M3"),
    "wrong_shape": (entry(shape=[2, 3, 5]), ValueError, "'c': Expected 120 bytes"),
    "negative_shape": (entry(shape=[-2, -3, 4]), ValueError, "'c': Expected"),
    "hole": (entry(data_offsets=[8, 104]), ValueError, "'c': Expected its data to start at byte 0"),
    "not_in_shard": (edit_index(x=FIRST), ValueError, rf"{FIRST}: Expected tensor 'x'"),
    "in_other_shard": (edit_index(a=SECOND), ValueError, rf"{SECOND}: Expected tensor 'a'"),
    "not_in_index": (edit_index(b=None), ValueError, rf"{FIRST}: Expected only tensors .* got 'b'"),
    "index_leaves_directory": (edit_index(x="../x.safetensors"), ValueError, r"the path '\.\./x\.safetensors'"),
    "index_without_map": (
        lambda d: (d / "model.safetensors.index.json").write_text("{}"), ValueError, "Expected a 'weight_map'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("fault", "error", "message"), FAULTS.values(), ids=FAULTS)
def test_fault(tmp_path, shards, fault, error, message):
    fault(write_directory(tmp_path, shards))
    with pytest.raises(error, match=message):
        open_checkpoint(tmp_path)


def test_duplicate_without_index(tmp_path, shards):
    write_directory(tmp_path, {"x.safetensors": shards[FIRST], "y.safetensors": shards[FIRST]}, index=False)
    with pytest.raises(ValueError, match=r"'a' in .*x\.safetensors and .*y\.safetensors"):
        open_checkpoint(tmp_path)


def test_missing_shard_without_index(tmp_path, shards):
    write_directory(tmp_path, {FIRST: shards[FIRST]}, index=False)
    with pytest.raises(FileNotFoundError, match=SECOND):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("file", "error", "message"),
    [
        (None, FileNotFoundError, r"Expected \*\.safetensors"),
        ("pytorch_model.bin", ValueError, "save_pretrained"),
        ("model.gguf", ValueError, "pass the file itself"),
    ],
    ids=["empty", "pickle", "gguf"],
)
def test_directory_without_safetensors(tmp_path, file, error, message):
    if file:
        (tmp_path / file).write_bytes(b"\x80\x04.")
    with pytest.raises(error, match=message):
        open_checkpoint(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="got no file"):
        open_checkpoint(tmp_path / "nothing")


def test_one_file_of_a_directory(tmp_path, shards):
    write_directory(tmp_path, shards)
    with pytest.raises(ValueError, match="pass the directory"):
        open_checkpoint(tmp_path / FIRST)
