"""Damaged and unsupported GGUF files give errors that name the file, the key or the tensor."""

import struct
import sys

import numpy as np
import pytest
from checkpoint_files import llama_metadata, llama_tensors, write_gguf
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from jint8.checkpoints import open_checkpoint


@pytest.fixture
def tensors():
    return llama_tensors(np.random.default_rng(0))


@pytest.fixture
def file(tmp_path, tensors):
    return write_gguf(tmp_path / "m.gguf", tensors)


def replaced(old, new):
    def change(data):
        assert data.count(old) == 1
        return data.replace(old, new)

    return change


def put(at, fmt, value):
    return lambda data: data[:at] + struct.pack(fmt, value) + data[at + struct.calcsize(fmt) :]


DAMAGE = {
    "empty": (lambda d: b"", r"which begins with b'GGUF'"),
    "other_format": (lambda d: b"PK\x03\x04" + d[4:], r"got b'PK"),
    "version_1": (put(4, "<I", 1), "Expected GGUF version 2 or 3, got 1"),
    "version_4": (put(4, "<I", 4), "got 4"),
    "big_endian": (put(4, ">I", 3), "big-endian"),
    "no_counts": (lambda d: d[:20], "truncated"),
    "header_only": (lambda d: d[:24], "truncated"),
    "in_metadata": (lambda d: d[:100], "truncated"),
    "in_data": (lambda d: d[:-64], r"tensor '.*truncated"),
    "no_data": (lambda d: d[:2200], r"tensor 'token_embd\.weight'.*truncated"),
    "too_many_keys": (put(16, "<Q", 10**9), "doesn't parse"),
    "too_many_tensors": (put(8, "<Q", 10**9), "Expected"),
    "huge_string": (put(24, "<Q", 2**63 - 1), "doesn't parse"),
    "unknown_tensor": (replaced(b"blk.0.ffn_up.weight", b"blk.0.ffn_xx.weight"), r"'blk\.0\.ffn_xx\.weight'.*unknown"),
    "tensor_twice": (replaced(b"blk.0.attn_v.weight", b"blk.0.attn_k.weight"), "k_proj.weight' twice"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged(file, damage, message):
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=message) as e:
        open_checkpoint(file)
    assert str(file) in str(e.value)


@pytest.mark.parametrize(
    "key", [k for k in llama_metadata() if k != "llama.attention.head_count_kv"], ids=lambda k: k.split(".")[-1]
)
def test_missing_metadata(tmp_path, tensors, key):
    with pytest.raises(ValueError, match=f"Expected the metadata {key}, got none"):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, llama_metadata(**{key: None})))


@pytest.mark.parametrize("value", [0, 4.5, [4, 4]], ids=["zero", "float", "per_layer"])
def test_bad_metadata(tmp_path, tensors, value):
    metadata = llama_metadata(**{"llama.attention.head_count": value})
    with pytest.raises(ValueError, match=r"positive number as llama\.attention\.head_count, got"):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, metadata))


@pytest.mark.parametrize("value", [0, 0.0])
def test_heads_of_no_size(tmp_path, tensors, value):
    metadata = llama_metadata(**{"llama.attention.key_length": value})
    with pytest.raises(ValueError, match=r"positive number as llama\.attention\.key_length, got 0"):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, metadata))


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_more_layers_than_tensors(tmp_path, tensors, arch):
    metadata = {key.replace("llama.", f"{arch}."): value for key, value in llama_metadata().items()}
    metadata[f"{arch}.block_count"] = 2**31
    path = write_gguf(
        tmp_path / "m.gguf", {k: tensors[k] for k in ("token_embd.weight", "output_norm.weight")}, metadata, arch=arch
    )
    with pytest.raises(ValueError, match=rf"Expected {arch}\.block_count to be at most 2 tensors, got 2147483648"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["token_embd.weight", "output_norm.weight"])
def test_missing_tensor(tmp_path, tensors, name):
    del tensors[name]
    with pytest.raises(ValueError, match="Expected a tensor 'model"):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors))


def test_unknown_architecture(tmp_path, tensors):
    with pytest.raises(ValueError, match=r"among llama, qwen2, .*, got 'mamba'"):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, arch="mamba"))


def test_type_without_dequantization(tmp_path, tensors):
    del tensors["blk.0.ffn_up.weight"]
    kind = GGMLQuantizationType.Q8_K
    raw = {"blk.0.ffn_up.weight": (np.zeros((2, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)}
    with pytest.raises(ValueError, match=r"'blk\.0\.ffn_up\.weight': Expected a type .*Q8_K"):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, raw=raw))


def test_heads_do_not_divide(tmp_path, tensors):
    path = write_gguf(tmp_path / "m.gguf", tensors, llama_metadata(**{"llama.attention.head_count": 7}))
    with pytest.raises(ValueError, match=r"q_proj\.weight': Expected rows for 7 heads"):
        open_checkpoint(path)


def test_key_twice(tmp_path, tensors):
    path = write_gguf(tmp_path / "m.gguf", tensors, llama_metadata(**{"llama.block_xxxxx": 1}))
    path.write_bytes(path.read_bytes().replace(b"llama.block_xxxxx", b"llama.block_count"))
    with pytest.raises(ValueError, match=r"got 'llama\.block_count' twice"):
        open_checkpoint(path)


def test_damaged_scales_give_nan_without_warning(tmp_path, tensors):
    del tensors["blk.0.ffn_up.weight"]
    raw = {"blk.0.ffn_up.weight": (np.full((2, 34), 0x7C, np.uint8), GGMLQuantizationType.Q8_0)}
    raw["blk.0.ffn_up.weight"][0][:, 2:] = 0
    got = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, raw=raw)).read("model.layers.0.mlp.up_proj.weight")
    assert np.isnan(got).all()


def test_closed(file):
    with open_checkpoint(file) as ckpt:
        pass
    with pytest.raises(ValueError, match="closed"):
        ckpt.read("lm_head.weight")


def test_package_missing(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"'gguf': pip install 'jint8\[hf\]'"):
        open_checkpoint(file)
