"""PyTorch's transformers: in float32, in int8 of bitsandbytes or torchao, or in four bits of bitsandbytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import stepwise
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

HEAD = "lm_head"


class Engine:
    packages = ("torch", "transformers", "bitsandbytes", "torchao")

    def __init__(
        self, weights: Path, threads: int, *, quantization: str = "", compiled: bool = False, int8_head: bool = True
    ):
        """`int8_head` is for torchao; bitsandbytes leaves the head in floating point."""
        torch.set_num_threads(threads)
        asked = {}
        if quantization in ("bitsandbytes", "nf4"):
            import bitsandbytes  # noqa: F401 (transformers' own message doesn't name the package)

            int8 = {"load_in_8bit": True, "llm_int8_threshold": 6.0}
            nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
            asked["quantization_config"] = BitsAndBytesConfig(**(nf4 if quantization == "nf4" else int8))
            asked["device_map"] = "cpu"
        self.model = AutoModelForCausalLM.from_pretrained(weights / "huggingface", dtype=torch.float32, **asked).eval()
        if quantization == "torchao":
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

            quantize_(
                self.model,
                Int8DynamicActivationInt8WeightConfig(),
                lambda module, name: isinstance(module, torch.nn.Linear) and (int8_head or name != HEAD),
            )
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

    @torch.inference_mode()
    def save_logits(self, tokens: list[list[int]], file: str) -> None:
        """Of each position of each sequence, one sequence to a call."""
        shape = (*np.shape(tokens), self.model.config.vocab_size)
        out = np.lib.format.open_memmap(file, "w+", np.float32, shape)
        for i, row in enumerate(tokens):
            out[i] = self.model(input_ids=torch.tensor([row])).logits[0].float().numpy()

    def projection_bytes(self) -> int:
        """Of the weights and scales of all products but the output head's."""
        layers = [(name, layer) for name, layer in self.model.named_modules() if isinstance(layer, torch.nn.Linear)]
        tensors = [tensor for name, layer in layers if name != HEAD for tensor in layer.state_dict().values()]
        return sum(map(_nbytes, (tensor for tensor in tensors if isinstance(tensor, torch.Tensor))))


def _nbytes(tensor: torch.Tensor) -> int:
    """Of a tensor, or of those that a quantized one is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    return sum(_nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
