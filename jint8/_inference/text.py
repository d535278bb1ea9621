"""Tokens to pieces of text, up to end tokens and stop texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from jint8._inference.request import texts
from jint8.checkpoints import Tokenizer


def stop_texts(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Texts before which an answer ends. Raises ValueError for an empty one, TypeError for what isn't text."""
    stop = tuple(texts("stop", stop))
    if not all(stop):
        raise ValueError("Expected stop texts that aren't empty, got an empty one.")
    return stop


def text_pieces(
    chunks: Iterable[np.ndarray], tokenizer: Tokenizer, rows: int, stop: tuple[str, ...]
) -> Iterator[list[str]]:
    """Pieces of text for each row, ending at end tokens and before stop texts.

    A piece may come later than its tokens: bytes of an incomplete character wait for the rest, and so does text that
    may be the beginning of a stop text.

    Args:
      chunks: int32 `[rows, n]` each, the next tokens of every row.
      tokenizer: makes text of them.
      rows: how many.
      stop: texts before which an answer ends, and which are left out.

    Yields:
      For each chunk, and once at the end, a piece of each row; "" where there is nothing new.
    """
    streams = [tokenizer.stream() for _ in range(rows)]
    held = [""] * rows  # text that may be the beginning of a stop text
    done = [False] * rows
    for chunk in chunks:
        pieces = [""] * rows
        for row, ids in enumerate(chunk):
            for token in ids:
                if done[row]:
                    break
                ended = int(token) in tokenizer.eos_ids
                held[row] += streams[row].flush() if ended else streams[row].push(int(token))
                cut, keep, stopped = _cut(held[row], stop)
                done[row] = ended or stopped
                pieces[row] += cut + (keep if ended and not stopped else "")
                held[row] = "" if done[row] else keep
        yield pieces
        if all(done):
            return
    yield ["" if done[row] else held[row] + streams[row].flush() for row in range(rows)]


def _cut(text: str, stop: tuple[str, ...]) -> tuple[str, str, bool]:
    """Text that is safe to send, text to hold back, and whether a stop text was found."""
    found = [at for at in (text.find(s) for s in stop) if at >= 0]
    if found:
        return text[: min(found)], "", True
    longest = max((n for s in stop for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n])), default=0)
    return text[: len(text) - longest], text[len(text) - longest :], False
