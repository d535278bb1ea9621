"""CTranslate2, whose loop calls back with each token: the times between are measured there."""

from __future__ import annotations

import json
import time
from pathlib import Path

import ctranslate2
from stepwise import Generated

DIRECTORY = "ctranslate2"


class Engine:
    packages = ("ctranslate2",)

    @staticmethod
    def prepare(weights: Path, threads: int) -> None:
        """Converts the Hugging Face directory (needs torch and transformers)."""
        converter = ctranslate2.converters.TransformersConverter(str(weights / "huggingface"))
        converter.convert(str(weights / DIRECTORY), quantization="int8", force=True)

    def __init__(self, weights: Path, threads: int):
        path = weights / DIRECTORY
        self.generator = ctranslate2.Generator(
            str(path), device="cpu", compute_type="int8", inter_threads=1, intra_threads=threads
        )
        self.names = json.loads((path / "vocabulary.json").read_text(encoding="utf-8"))

    def generate(self, prompts: list[list[int]], steps: int) -> Generated:
        times: dict[int, float] = {}

        def seen(result) -> bool:
            times[result.step] = time.perf_counter()  # of a batch, the last one stays
            return False  # go on

        names = [[self.names[token] for token in prompt] for prompt in prompts]
        begin = time.perf_counter()
        results = self.generator.generate_batch(
            names,
            beam_size=1,
            sampling_topk=1,
            min_length=1 + steps,  # no end token before
            max_length=1 + steps,
            include_prompt_in_result=False,
            callback=seen,
        )
        first, last = times[min(times)], times[max(times)]
        return Generated(first - begin, last - first, [list(result.sequences_ids[0]) for result in results])
