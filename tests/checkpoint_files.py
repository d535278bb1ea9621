"""Tiny checkpoints that tests write for themselves."""

import json
import os
import struct
from pathlib import Path

import gguf
import numpy as np

LLAMA = {"hidden_size": 64, "intermediate_size": 96, "layers": 1, "heads": 4, "kv_heads": 2, "vocab": 32}
TYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32"}
TYPES |= {"int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}


def safetensors_bytes(tensors, **changes):
    """A safetensors file; `changes` replaces entries of the header."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, x in tensors.items():
        end = len(data) + x.nbytes
        header[name] = {"dtype": TYPES[x.dtype.name], "shape": list(x.shape), "data_offsets": [len(data), end]}
        data += x.tobytes()
    text = json.dumps(header | changes).encode()
    return struct.pack("<Q", len(text)) + text + data


def write_directory(path, shards, *, config=None, index=True):
    """A Hugging Face directory: one file, or several with an index."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    for name, tensors in shards.items():
        (path / name).write_bytes(safetensors_bytes(tensors))
    if index and "model.safetensors" not in shards:
        weight_map = {t: file for file, tensors in shards.items() for t in tensors}
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def llama_tensors(rng, *, arch="llama", head=True):
    """float32 weights of a tiny decoder by llama.cpp's names, in NumPy's order of axes."""
    h, f, v = LLAMA["hidden_size"], LLAMA["intermediate_size"], LLAMA["vocab"]
    kv = h // LLAMA["heads"] * LLAMA["kv_heads"]
    shapes = {"token_embd.weight": (v, h), "output_norm.weight": (h,)}
    if head:
        shapes["output.weight"] = (v, h)
    for layer in range(LLAMA["layers"]):
        blk = f"blk.{layer}."
        shapes |= {blk + "attn_norm.weight": (h,), blk + "ffn_norm.weight": (h,)}
        shapes |= {blk + "attn_q.weight": (h, h), blk + "attn_k.weight": (kv, h), blk + "attn_v.weight": (kv, h)}
        shapes |= {blk + "attn_output.weight": (h, h), blk + "ffn_down.weight": (h, f)}
        shapes |= {blk + "ffn_gate.weight": (f, h), blk + "ffn_up.weight": (f, h)}
        if arch in ("qwen3", "gemma3"):
            d = h // LLAMA["heads"]
            shapes |= {blk + "attn_q_norm.weight": (d,), blk + "attn_k_norm.weight": (d,)}
        if arch == "qwen2":
            shapes |= {blk + "attn_q.bias": (h,), blk + "attn_k.bias": (kv,), blk + "attn_v.bias": (kv,)}
        if arch == "gemma3":
            shapes |= {blk + "post_attention_norm.weight": (h,), blk + "post_ffw_norm.weight": (h,)}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def llama_metadata(arch="llama", **extra):
    """The metadata that every decoder has; a value of None leaves the key out."""
    keys = {
        "embedding_length": LLAMA["hidden_size"],
        "feed_forward_length": LLAMA["intermediate_size"],
        "block_count": LLAMA["layers"],
        "attention.head_count": LLAMA["heads"],
        "attention.head_count_kv": LLAMA["kv_heads"],
        "attention.layer_norm_rms_epsilon": 1e-5,
        "context_length": 128,
    }
    return {k: v for k, v in ({f"{arch}.{k}": v for k, v in keys.items()} | extra).items() if v is not None}


def write_gguf(path, tensors, metadata=None, *, arch="llama", types=None, raw=None):
    """A GGUF file by the reference writer.

    `types` maps names to a GGMLQuantizationType to quantize to; `raw` maps names to (bytes per row, type).
    """
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (llama_metadata(arch) if metadata is None else metadata).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    for name, x in tensors.items():
        if types and name in types:
            writer.add_tensor(name, gguf.quants.quantize(x, types[name]), raw_dtype=types[name])
        else:
            writer.add_tensor(name, x)
    for name, (data, kind) in (raw or {}).items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def find_smollm2():
    """SmolLM2-135M-Instruct where it is there: at $JINT8_TEST_SMOLLM2, or in the cache."""
    if file := os.environ.get("JINT8_TEST_SMOLLM2"):
        return Path(file) if Path(file).exists() else None
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(os.environ.get("JINT8_CACHE") or Path(cache, "jint8"))
    return next(root.rglob("SmolLM2-135M-Instruct*.gguf"), None)
