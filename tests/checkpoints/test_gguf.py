"""GGUF files that the gguf package wrote: values of every type, names, configurations."""

import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import LLAMA, llama_metadata, llama_tensors, write_gguf
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf_oracle import FOUR_BITS, ORACLES

from jint8.checkpoints import open_checkpoint

Q = GGMLQuantizationType
UP = "model.layers.0.mlp.up_proj.weight"
HEADS, KV, D = LLAMA["heads"], LLAMA["kv_heads"], LLAMA["hidden_size"] // LLAMA["heads"]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("kind", ORACLES, ids=lambda k: k.name)
def test_block_type(tmp_path, rng, kind):
    oracle, scales_at = ORACLES[kind]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (6, 2, block_bytes), np.uint8)
    for at in scales_at:  # random bytes may be infinite as float16
        raw[..., at : at + 2] = rng.uniform(-1, 1, (6, 2, 1)).astype(np.float16).view(np.uint8)
    expected = np.array([[v for b in row for v in oracle(b)] for row in raw])
    tensors = llama_tensors(rng)
    del tensors["blk.0.ffn_up.weight"]
    path = write_gguf(tmp_path / "m.gguf", tensors, raw={"blk.0.ffn_up.weight": (raw.reshape(6, -1), kind)})
    with open_checkpoint(path) as ckpt:
        info, got, rows = ckpt.tensors[UP], ckpt.read(UP), ckpt.read_rows(UP, 2, 5)
    assert (info.dtype, info.shape, info.nbytes, info.file) == (kind.name, (6, 2 * block), raw.nbytes, path)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(rows, got[2:5])


@pytest.mark.parametrize("kind", FOUR_BITS, ids=lambda k: k.name)
def test_codes_of_four_bits(tmp_path, rng, kind):
    oracle, scales_at = ORACLES[kind]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (6, 2, block_bytes), np.uint8)
    for at in scales_at:
        raw[..., at : at + 2] = rng.uniform(-1, 1, (6, 2, 1)).astype(np.float16).view(np.uint8)
    tensors = llama_tensors(rng)
    del tensors["blk.0.ffn_up.weight"]
    path = write_gguf(tmp_path / "m.gguf", tensors, raw={"blk.0.ffn_up.weight": (raw.reshape(6, -1), kind)})
    with open_checkpoint(path) as ckpt:
        codes, step, low = ckpt.read_groups(UP, 2, 5)
        assert ckpt.group(UP) == 32
        assert ckpt.group("model.layers.0.mlp.down_proj.weight") is None
        with pytest.raises(ValueError, match=r"down_proj\.weight': Expected a tensor in four bits"):
            ckpt.read_groups("model.layers.0.mlp.down_proj.weight", 0, 1)
    assert (codes.dtype, codes.shape, step.shape, low.shape) == (np.uint8, (3, 2 * block), *2 * [(3, 2 * block // 32)])
    np.testing.assert_array_equal(codes, [[c for b in row for c in FOUR_BITS[kind](b)] for row in raw[2:5]])
    values = np.repeat(step, 32, 1) * codes + np.repeat(low, 32, 1)
    np.testing.assert_allclose(values, [[v for b in row for v in oracle(b)] for row in raw[2:5]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "step"),
    [(Q.Q4_0, 1 / 8), (Q.Q4_1, 1 / 15), (Q.Q5_0, 1 / 16), (Q.Q5_1, 1 / 31), (Q.Q8_0, 1 / 127)],
    ids=lambda v: getattr(v, "name", ""),
)
def test_quantized_by_the_reference(tmp_path, rng, kind, step):
    tensors = llama_tensors(rng)
    w = tensors["blk.0.attn_q.weight"] = rng.uniform(-1, 1, (64, 64)).astype(np.float32)
    path = write_gguf(tmp_path / "m.gguf", tensors, types={"blk.0.attn_q.weight": kind})
    got = open_checkpoint(path).read("model.layers.0.self_attn.q_proj.weight")
    np.testing.assert_allclose(got, unpermuted(w, HEADS), atol=2.1 * step)
    assert np.corrcoef(got.ravel(), unpermuted(w, HEADS).ravel())[0, 1] > 0.99


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32], ids=lambda d: np.dtype(d).name)
def test_float_type(tmp_path, rng, dtype):
    tensors = llama_tensors(rng)
    w = tensors.pop("blk.0.ffn_up.weight").astype(dtype)
    if dtype is ml_dtypes.bfloat16:
        raw = {"blk.0.ffn_up.weight": (w.view(np.uint8), Q.BF16)}
    else:
        tensors["blk.0.ffn_up.weight"], raw = w, None
    got = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, raw=raw)).read(UP)
    assert got.dtype == w.dtype
    np.testing.assert_array_equal(got, w)


def unpermuted(w, heads):
    """Hugging Face's row order from llama.cpp's, row by row."""
    out, d = np.empty_like(w), len(w) // heads
    for head in range(heads):
        for pair in range(d // 2):
            for half in range(2):
                out[head * d + half * d // 2 + pair] = w[head * d + 2 * pair + half]
    return out


@pytest.mark.parametrize(("start", "stop"), [(0, 32), (0, 0), (3, 9), (15, 17), (31, 32)], ids=str)
def test_rows_of_rotary_projections(tmp_path, rng, start, stop):
    tensors = llama_tensors(rng)
    tensors["blk.0.attn_k.bias"] = rng.standard_normal(KV * D, np.float32)
    ckpt = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors))
    for name in ("weight", "bias"):
        expected = unpermuted(tensors[f"blk.0.attn_k.{name}"], KV)[start:stop]
        got = ckpt.read_rows(f"model.layers.0.self_attn.k_proj.{name}", start, stop)
        np.testing.assert_array_equal(got, expected)
    assert ckpt.config["attention_bias"] is False  # that is about the query


NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "model.layers.0.input_layernorm", "attn_v": "model.layers.0.self_attn.v_proj",
    "attn_output": "model.layers.0.self_attn.o_proj", "ffn_norm": "model.layers.0.post_attention_layernorm",
    "ffn_gate": "model.layers.0.mlp.gate_proj", "ffn_down": "model.layers.0.mlp.down_proj",
}  # fmt: skip


def test_names(tmp_path, rng):
    tensors = llama_tensors(rng)
    ckpt = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors))
    assert len(ckpt.tensors) == len(tensors)
    for ours, theirs in NAMES.items():
        name = f"{ours}.weight" if f"{ours}.weight" in tensors else f"blk.0.{ours}.weight"
        np.testing.assert_array_equal(ckpt.read(f"{theirs}.weight"), tensors[name], err_msg=theirs)


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "gemma3"])
def test_architecture(tmp_path, rng, arch):
    tensors = llama_tensors(rng, arch=arch)
    metadata = llama_metadata(arch, **{f"{arch}.attention.key_length": D})
    ckpt = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, metadata, arch=arch))
    layer = "model.layers.0."
    assert ckpt.config.get("attention_bias") is (None if arch == "qwen2" else False)  # Qwen2 always has them
    np.testing.assert_array_equal(ckpt.read(layer + "self_attn.q_proj.weight"), tensors["blk.0.attn_q.weight"])
    if arch == "qwen2":
        np.testing.assert_array_equal(ckpt.read(layer + "self_attn.k_proj.bias"), tensors["blk.0.attn_k.bias"])
    if arch == "qwen3":
        np.testing.assert_array_equal(ckpt.read(layer + "self_attn.q_norm.weight"), tensors["blk.0.attn_q_norm.weight"])
    if arch == "gemma3":
        assert ckpt.config["model_type"] == "gemma3_text"
        norm = ckpt.read(layer + "pre_feedforward_layernorm.weight")
        np.testing.assert_allclose(norm, tensors["blk.0.ffn_norm.weight"] - 1, atol=1e-6)
        norm = ckpt.read(layer + "post_attention_layernorm.weight")
        np.testing.assert_allclose(norm, tensors["blk.0.post_attention_norm.weight"] - 1, atol=1e-6)


def test_config(tmp_path, rng):
    metadata = llama_metadata(**{
        "llama.rope.freq_base": 100000.0, "llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
    })  # fmt: skip
    ckpt = open_checkpoint(write_gguf(tmp_path / "m.gguf", llama_tensors(rng), metadata))
    assert ckpt.config == {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 32, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128, "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False,
        "mlp_bias": False, "rope_theta": 100000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    assert ckpt.format == "gguf"
    assert ckpt.file_bytes == (tmp_path / "m.gguf").stat().st_size


def test_tied_head(tmp_path, rng):
    ckpt = open_checkpoint(write_gguf(tmp_path / "m.gguf", llama_tensors(rng, head=False)))
    assert ckpt.config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in ckpt.tensors


def llama3_factors(theta, half, factor):
    out = []
    for i in range(half):
        wavelength = 2 * np.pi * theta ** (i / half)
        if wavelength < 8192 / 4:
            out.append(1.0)
        elif wavelength > 8192:
            out.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


def test_llama3_rope_scaling(tmp_path, rng):
    tensors = llama_tensors(rng) | {"rope_freqs.weight": llama3_factors(500000.0, D // 2, 32.0)}
    metadata = llama_metadata(**{"llama.rope.freq_base": 500000.0})
    ckpt = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, metadata))
    assert ckpt.config["rope_scaling"] == {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    assert "rope_freqs.weight" not in ckpt.tensors


def test_phi3(tmp_path, rng):
    """Fused projections, part of a head rotated, two tables of frequencies."""
    tensors = {
        k: v for k, v in llama_tensors(rng).items() if not any(part in k for part in ("_q.", "_k.", "_v.", "gate"))
    }
    tensors |= {"blk.0.attn_qkv.weight": rng.standard_normal((128, 64), np.float32)}
    tensors |= {f"rope_factors_{kind}.weight": np.full(6, v, np.float32) for kind, v in (("long", 2), ("short", 1))}
    metadata = llama_metadata(
        "phi3", **{"phi3.rope.dimension_count": 12, "phi3.rope.scaling.original_context_length": 64}
    )
    ckpt = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, metadata, arch="phi3"))
    qkv = ckpt.read("model.layers.0.self_attn.qkv_proj.weight")
    np.testing.assert_array_equal(qkv, tensors["blk.0.attn_qkv.weight"])
    assert "model.layers.0.mlp.gate_up_proj.weight" in ckpt.tensors
    assert ckpt.config["partial_rotary_factor"] == 0.75
    assert ckpt.config["rope_scaling"] == {
        "rope_type": "longrope", "long_factor": [2.0] * 6, "short_factor": [1.0] * 6,
        "original_max_position_embeddings": 64,
    }  # fmt: skip


def test_other_rope_factors(tmp_path, rng):
    tensors = llama_tensors(rng) | {"rope_freqs.weight": np.linspace(1, 5, D // 2, dtype=np.float32)}
    with pytest.raises(ValueError, match=r"rope_freqs\.weight.*Llama 3"):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors))


def test_split(tmp_path, rng):
    tensors = llama_tensors(rng)
    writer = GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=5)
    for key, value in llama_metadata().items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
    for name, x in tensors.items():
        writer.add_tensor(name, x)
    writer.write_header_to_file(tmp_path / "m.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files = sorted(tmp_path.glob("*.gguf"))
    assert len(files) == 3
    for opened in files:  # any of them stands for all
        with open_checkpoint(opened) as ckpt:
            assert ckpt.files == tuple(files)
            np.testing.assert_array_equal(ckpt.read(UP), tensors["blk.0.ffn_up.weight"])
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=files[1].name):
        open_checkpoint(files[0])
