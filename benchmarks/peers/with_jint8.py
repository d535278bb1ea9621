"""jint8, through its public API."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from stepwise import Generated

import jint8


class Engine:
    packages = ("jint8", "jax", "jaxlib")

    def __init__(
        self, weights: Path, threads: int, *, threshold: float = 6.0, include: str = "", quantize: bool = True
    ):
        model = jint8.load(
            weights / "huggingface",
            config=jint8.Config(threshold=threshold),
            include=include or (),
            quantize=quantize,
        )
        self.model = dataclasses.replace(model, tokenizer=None)  # knows no end tokens: never stops early
        # As a process that answers for long does, for the requests that it will have.
        self.model.warm(batch=1, prompt=512, max_tokens=128)
        self.model.warm(batch=16, prompt=32, max_tokens=33)

    def generate(self, prompts: list[list[int]], steps: int) -> Generated:
        begin = time.perf_counter()
        chunks = self.model.generate_tokens(prompts, max_tokens=1 + steps, every=max(steps, 1))
        columns = list(next(chunks).T)
        middle = time.perf_counter()
        for chunk in chunks:
            columns += list(chunk.T)
        end = time.perf_counter()
        return Generated(middle - begin, end - middle, [list(map(int, row)) for row in zip(*columns, strict=True)])
