"""ONNX Runtime: its own export of the model, with a cache and fused attention, and its dynamic int8 quantization."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
import stepwise

FILE = "dynamic_int8.onnx"


class Engine:
    packages = ("onnxruntime", "onnxruntime-genai")

    @staticmethod
    def prepare(weights: Path, threads: int) -> None:
        """Exports to float32 and quantizes the products (needs onnxruntime-genai, onnx, torch and transformers)."""
        from onnxruntime.quantization import QuantType, quantize_dynamic

        with tempfile.TemporaryDirectory(dir=weights) as directory:
            builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "fp32", "-e", "cpu"]
            paths = ["-i", str(weights / "huggingface"), "-o", directory, "-c", directory]
            last = ["--extra_options", "prune_lm_head=true"]  # logits of the last position alone
            subprocess.run([*builder, *paths, *last], check=True, env=os.environ | {"TQDM_DISABLE": "1"})
            quantize_dynamic(
                Path(directory, "model.onnx"),
                weights / FILE,
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                weight_type=QuantType.QInt8,
                reduce_range=True,  # 7 bits: without VNNI, sums of two u8 x s8 products saturate in 16 bits
            )

    def __init__(self, weights: Path, threads: int):
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = ort.InferenceSession(str(weights / FILE), options, providers=["CPUExecutionProvider"])
        self.cached = [info for info in self.session.get_inputs() if info.name.startswith("past_key_values.")]
        self.head_dim = json.loads((weights / "huggingface" / "config.json").read_text())["head_dim"]
        self.outputs = [info.name for info in self.session.get_outputs()]

    def generate(self, prompts: list[list[int]], steps: int) -> stepwise.Generated:
        length = 0
        cache = {
            info.name: _value(np.zeros((len(prompts), info.shape[1], 0, self.head_dim), np.float32))
            for info in self.cached
        }

        def run(rows: Sequence[Sequence[int]]) -> Sequence[int]:
            nonlocal length, cache
            tokens = np.asarray(rows, np.int64)
            length += tokens.shape[1]
            mask = np.ones((len(tokens), length), np.int64)
            feeds = {"input_ids": _value(tokens), "attention_mask": _value(mask), **cache}
            outs = dict(zip(self.outputs, self.session.run_with_ort_values(self.outputs, feeds), strict=True))
            cache = {name: outs[name.replace("past_key_values", "present")] for name in cache}
            return outs["logits"].numpy()[:, -1].argmax(-1)

        return stepwise.generate(lambda: run(prompts), lambda tokens: run([[token] for token in tokens]), steps)


def _value(array: np.ndarray) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(array)
