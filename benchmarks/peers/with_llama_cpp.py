"""llama.cpp, through the C API that llama-cpp-python binds: batches are sequences of one context."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import llama_cpp as ll
import numpy as np
import stepwise

FILE = "q8_0.gguf"
ROOM = 128  # a sequence's part of the cache is a multiple of this, so that requests share contexts


@ll.llama_log_callback
def _quiet(level, text, data):
    pass


class Engine:
    packages = ("llama-cpp-python",)

    @staticmethod
    def prepare(weights: Path, threads: int) -> None:
        """Requantizes the source file to Q8_0."""
        params = ll.llama_model_quantize_default_params()
        params.ftype = ll.LLAMA_FTYPE_MOSTLY_Q8_0
        params.allow_requantize = True
        params.nthread = threads
        source = weights / "source.gguf"
        if failed := ll.llama_model_quantize(bytes(source), bytes(weights / FILE), ctypes.byref(params)):
            raise OSError(f"Expected llama.cpp to requantize {source}, got error {failed}")

    def __init__(self, weights: Path, threads: int):
        ll.llama_log_set(_quiet, None)
        ll.llama_backend_init()
        self.model = ll.llama_model_load_from_file(bytes(weights / FILE), ll.llama_model_default_params())
        if not self.model:
            raise OSError(f"Expected llama.cpp to load {weights / FILE}, got nothing")
        self.vocab_size = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self.model))
        self.threads = threads
        self.contexts: dict[tuple[int, int, int], ctypes.c_void_p] = {}

    def generate(self, prompts: list[list[int]], steps: int) -> stepwise.Generated:
        length = len(prompts[0])
        context = self._context(len(prompts), length, -(-(length + steps) // ROOM) * ROOM)
        ll.llama_memory_clear(ll.llama_get_memory(context), True)
        slot = length

        def step(tokens: Sequence[int]) -> list[int]:
            nonlocal slot
            slot += 1
            return self._decode(context, [[token] for token in tokens], slot - 1)

        return stepwise.generate(lambda: self._decode(context, prompts, 0), step, steps)

    def _context(self, batch: int, length: int, room: int):
        """A context with a cache of `room` tokens for each sequence; the flash attention setting is the default."""
        key = (batch, length, room)
        if key not in self.contexts:
            params = ll.llama_context_default_params()
            params.n_ctx, params.n_batch, params.n_seq_max = batch * room, batch * length, batch
            params.n_threads = params.n_threads_batch = self.threads
            self.contexts[key] = ll.llama_init_from_model(self.model, params)
            if not self.contexts[key]:
                raise OSError(f"Expected a context for {batch} sequences of {room} tokens, got nothing")
        return self.contexts[key]

    def _decode(self, context, rows: list[list[int]], position: int) -> list[int]:
        """Runs the tokens of each sequence, the first of which stands at `position`; the most likely next ones."""
        batch = ll.llama_batch_init(sum(map(len, rows)), 0, 1)
        last = []
        i = 0
        for sequence, row in enumerate(rows):
            for offset, token in enumerate(row):
                batch.token[i], batch.pos[i] = token, position + offset
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
                batch.logits[i] = offset == len(row) - 1
                i += 1
            last.append(i - 1)
        batch.n_tokens = i
        failed = ll.llama_decode(context, batch)
        ll.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"Expected llama_decode to run {i} tokens, got error {failed}")
        return [int(self._logits(context, i).argmax()) for i in last]

    def _logits(self, context, i: int) -> np.ndarray:
        return np.ctypeslib.as_array(ll.llama_get_logits_ith(context, i), (self.vocab_size,))
