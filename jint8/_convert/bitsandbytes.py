"""Checkpoints that bitsandbytes saved in int8, and how to write them: the same numbers as a `QTensor`'s.

A linear layer `a.b` is three tensors there: `a.b.weight`, int8 `[n, k]`; `a.b.SCB`, float32 `[n]`, the largest
magnitude of each row, which is 127 times our scale; and `a.b.weight_format`, the order of the int8 values in memory. Of
its values only 0, row after row, is read here: the others are layouts of certain GPUs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jint8._convert.options import Options, shown
from jint8._core.config import Config
from jint8._core.qtensor import QTensor, is_qtensor
from jint8._trees.paths import leaf_paths
from jint8.checkpoints import Checkpoint
from jint8.models import ModelConfig
from jint8.models.families import HEAD, family, sources, split

# What transformers writes into a `quantization_config`, besides the two options that `to_tensors` decides.
_FIXED_OPTIONS = {
    "_load_in_4bit": False,
    "_load_in_8bit": True,
    "bnb_4bit_compute_dtype": "float32",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "load_in_4bit": False,
    "load_in_8bit": True,
    "quant_method": "bitsandbytes",
}


METHOD = "bitsandbytes"


def options(asked: dict[str, Any]) -> Options:
    """The `Options` in a `quantization_config`: a threshold, and what to skip. Weights may be in floating point still.

    In four bits, which are dequantized as they are read, it says nothing of how to quantize.

    Raises:
      ValueError: neither 8 nor 4 bits.
      TypeError, ValueError: a threshold that `Config` refuses.
    """
    if not asked.get("load_in_8bit") and not asked.get("load_in_4bit"):
        raise ValueError("Expected a quantization_config of bitsandbytes in 8 or 4 bits, got bitsandbytes in none.")
    threshold, skip = asked.get("llm_int8_threshold"), asked.get("llm_int8_skip_modules") or ()
    if not isinstance(skip, (list, tuple)) or not all(isinstance(name, str) for name in skip):
        raise ValueError(f"Expected llm_int8_skip_modules to be a list of names, got {shown(skip)}.")
    in_8_bits = bool(asked.get("load_in_8bit"))
    config = Config(threshold=threshold) if in_8_bits and threshold is not None else None
    return Options(METHOD, config, tuple(name.replace(".", "/") for name in skip))


def read_scales(checkpoint: Checkpoint, module: str, n: int) -> np.ndarray:
    """The scales of the weight `MODULEweight`, float32 `[n]`.

    Raises:
      ValueError: scales of a wrong shape or dtype, or values in another order than rows.
    """
    absmax = checkpoint.read(f"{module}SCB")
    if absmax.dtype != np.float32 or absmax.shape != (n,):
        raise ValueError(f"Expected {module}SCB as float32 ({n},), got {absmax.dtype} {absmax.shape}.")
    if f"{module}weight_format" in checkpoint.tensors:
        order = checkpoint.read(f"{module}weight_format")
        if order.tobytes().strip(b"\0"):
            raise ValueError(
                f"Expected {module}weight_format 0 (rows), got {order.reshape(-1)[0]}: save it with a newer "
                "bitsandbytes."
            )
    return absmax / np.float32(127)


def to_tensors(params: Any, config: ModelConfig) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of a model as bitsandbytes has them, and the `quantization_config` for its `config.json`.

    Args:
      params: of `jint8.models.Decoder`, projections as `QTensor`s with one scale per row.
      config: of the model.

    Returns:
      Arrays by their Hugging Face names, and a dict.

    Raises:
      ValueError: int8 weights of a kind that bitsandbytes hasn't; the message names the parameter.
    """
    leaves = dict(leaf_paths(params, is_leaf=is_qtensor))
    if any(path.endswith("/lora_a") for path in leaves):
        raise ValueError("Expected a model without an adapter, which PEFT keeps in files of its own, got one with.")
    tensors: dict[str, np.ndarray] = {}
    # transformers has a linear layer also for a head that is tied to the embedding, and would quantize it.
    skipped = [str(family(config).modules[HEAD])] if config.tie_embeddings else []
    threshold = 6.0  # the default of transformers, for a model without int8 weights
    for path, source in sources(config, leaves, ()).items():
        leaf = leaves[path]
        if not is_qtensor(leaf):
            for name, part in zip(source.tensors, split(np.asarray(leaf), path, source, config), strict=True):
                tensors[name] = part.T if source.transposed else part
            if path.endswith("/weight"):
                skipped += [name.removesuffix(".weight") for name in source.tensors]
            continue
        _check_weight(path, leaf)
        threshold = leaf.config.threshold if leaf.config.decomposes else 0.0
        parts = (split(np.asarray(array), path, source, config) for array in (leaf.q, leaf.scale))
        for name, q, scale in zip(source.tensors, *parts, strict=True):
            module = name.removesuffix("weight")
            tensors[name] = q  # int8 is stored as [n, k] also for GPT-2, whose float weights are [k, n]
            tensors[f"{module}SCB"] = _exact_absmax(scale)[:, 0]
            tensors[f"{module}weight_format"] = np.array(0, np.uint8)
    asked = {"llm_int8_skip_modules": skipped, "llm_int8_threshold": threshold}
    return tensors, _FIXED_OPTIONS | asked


def _check_weight(path: str, w: QTensor) -> None:
    """Raises ValueError for an int8 weight that a linear layer of bitsandbytes can't have."""
    scheme = w.config.table_row
    if w.smooth is not None:
        raise ValueError(
            f"{path}: Expected a weight as the model has it, got one whose features were smoothed and rotated (rotate="
            f"{w.config.rotate}), which only jint8 undoes in the activations."
        )
    if path == "embedding" or w.q.ndim != 2:
        what = "experts" if w.q.ndim > 2 else "embeddings"
        raise ValueError(f"{path}: Expected no int8 {what}, which bitsandbytes keeps in floating point, got some.")
    if scheme.affine or scheme.weights != "channel" or w.order is not None:
        raise ValueError(f"{path}: Expected one symmetric scale per row, got the scheme {w.config.scheme!r}.")


def _exact_absmax(scale: np.ndarray) -> np.ndarray:
    """127 times the scale, rounded so that a division by 127, as `read_scales` does it, gives it back: every bit
    of a scale that is the 127th part of a float, as ours are; others may be off by one unit in the last place."""
    absmax = scale * np.float32(127)
    for other in (np.nextafter(absmax, np.float32(0)), np.nextafter(absmax, np.float32(np.inf))):
        absmax = np.where(other / np.float32(127) == scale, other, absmax)
    return absmax
