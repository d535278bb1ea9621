"""SentencePiece's own file, `tokenizer.model`: a protocol buffer, read without a package for those.

What is read is put as GGUF's metadata, which has the same parts, so that one builder serves both.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # protobuf's ways to write a value
# Numbers of fields in sentencepiece_model.proto.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
PIECE, SCORE, TYPE = 1, 2, 3
MODEL_TYPE, UNKNOWN_ID, BOS_ID, EOS_ID, PAD_ID = 3, 40, 41, 42, 43
CHARSMAP, ADD_PREFIX, REMOVE_SPACES, ESCAPE_SPACES = 2, 3, 4, 5
KINDS = {1: "t5", 2: "llama"}  # unigram and BPE, as GGUF calls them


def metadata_of_sentencepiece(file: Path) -> dict[str, Any]:
    """A `tokenizer.model` as GGUF's metadata.

    Args:
      file: the path.

    Returns:
      The keys `tokenizer.ggml.*`.

    Raises:
      ValueError: the file doesn't parse, or is of a kind that is neither BPE nor unigram.
    """
    try:
        return _metadata(file.read_bytes())
    except (IndexError, struct.error, UnicodeDecodeError, TypeError) as e:
        raise ValueError(f"{file}: Expected a SentencePiece model, got one that doesn't parse: {e}") from e
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from e


def _metadata(data: bytes) -> dict[str, Any]:
    tokens: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for field, value in _fields(data):
        if field == PIECES:
            piece = dict(_fields(value))
            tokens.append(piece[PIECE].decode("utf-8") if PIECE in piece else "")
            scores.append(struct.unpack("<f", piece.get(SCORE, b"\0\0\0\0"))[0])
            types.append(piece.get(TYPE, 1))
        elif field in (TRAINER, NORMALIZER):
            (trainer if field == TRAINER else normalizer).update(_fields(value))
    kind = trainer.get(MODEL_TYPE, 1)
    if kind not in KINDS or not tokens:
        raise ValueError(f"Expected a SentencePiece model of pieces, unigram or BPE, got type {kind}")
    if not normalizer.get(ESCAPE_SPACES, 1):
        raise ValueError("Expected a SentencePiece model that writes spaces as U+2581, got one that doesn't")
    ids = {"unknown": (UNKNOWN_ID, 0), "bos": (BOS_ID, 1), "eos": (EOS_ID, 2), "padding": (PAD_ID, -1)}
    numbers = {name: _signed(trainer.get(field, default)) for name, (field, default) in ids.items()}
    return {
        "tokenizer.ggml.model": KINDS[kind],
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": bool(normalizer.get(ADD_PREFIX, 1)),
        "tokenizer.ggml.remove_extra_whitespaces": bool(normalizer.get(REMOVE_SPACES, 1)),
        "tokenizer.ggml.precompiled_charsmap": normalizer.get(CHARSMAP, b""),
        **{f"tokenizer.ggml.{name}_token_id": number for name, number in numbers.items() if number >= 0},
    }


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a message: an int, or bytes of whatever is longer."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        field, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = _varint(data, at)
            yield field, value
            continue
        if kind == BYTES:
            size, at = _varint(data, at)
        elif kind in (FIXED32, FIXED64):
            size = 4 if kind == FIXED32 else 8
        else:
            raise ValueError(f"Expected a protocol buffer, got a field of kind {kind}")
        if at + size > len(data):
            raise ValueError(f"Expected {size} bytes in a field, got {len(data) - at} (truncated file)")
        yield field, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and where the next value begins."""
    value, shift = 0, 0
    while shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("Expected a protocol buffer, got a number of more than ten bytes")


def _signed(value: int) -> int:
    """A number as protobuf's int32, of which negative ones are written in 64 bits."""
    return value - 2**64 if value >= 2**63 else value
