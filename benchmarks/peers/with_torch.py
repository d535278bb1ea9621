"""PyTorch's transformers: in float32, or in int8 of bitsandbytes or torchao."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import stepwise
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


class Engine:
    packages = ("torch", "transformers", "bitsandbytes", "torchao")

    def __init__(self, weights: Path, threads: int, *, quantization: str = "", compiled: bool = False):
        torch.set_num_threads(threads)
        asked = {}
        if quantization == "bitsandbytes":
            import bitsandbytes  # noqa: F401 (transformers' own message doesn't name the package)

            asked["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0)
            asked["device_map"] = "cpu"
        self.model = AutoModelForCausalLM.from_pretrained(weights / "huggingface", dtype=torch.float32, **asked).eval()
        if quantization == "torchao":
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

            quantize_(self.model, Int8DynamicActivationInt8WeightConfig())
        self.forward = torch.compile(self.model.forward, dynamic=True) if compiled else self.model.forward

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], steps: int) -> stepwise.Generated:
        cache = None

        def run(tokens: torch.Tensor) -> Sequence[int]:
            nonlocal cache
            out = self.forward(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            return out.logits[:, -1].argmax(-1).tolist()

        return stepwise.generate(
            lambda: run(torch.tensor(prompts)), lambda tokens: run(torch.tensor(tokens)[:, None]), steps
        )
