"""Pieces of streamed text add up to the text, and characters are never cut."""

import itertools

import numpy as np
import pytest

from jint8.checkpoints import TextStream


def byte_stream():
    """One token per byte."""
    calls = []

    def decode(ids):
        calls.append(len(ids))
        return bytes(ids).decode(errors="replace")

    return TextStream(decode, skip=frozenset({300})), calls


TEXTS = {
    "ascii": "hello",
    "two": "äöü",
    "three": "日本語",
    "four": "🤗🤗",
    "mixed": "aé日🤗z",
    "replacement": "a\ufffdb",
    "empty": "",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_characters_come_whole(text):
    stream, _ = byte_stream()
    pieces = [stream.push(b) for b in text.encode()]
    assert "".join(pieces) + stream.flush() == text
    if "\ufffd" not in text:
        assert [p for p in pieces if p] == list(text)


def test_token_boundaries_within_characters():
    text = "日本語テキスト🤗" * 20
    data, rng = text.encode(), np.random.default_rng(0)
    cuts = [0, *sorted(rng.choice(len(data), 150, replace=False).tolist()), len(data)]
    tokens = [data[a:b] for a, b in itertools.pairwise(cuts)]
    stream = TextStream(lambda ids: b"".join(tokens[i] for i in ids).decode(errors="replace"))
    pieces = [stream.push(i) for i in range(len(tokens))]
    assert "".join(pieces) + stream.flush() == text
    assert not any("\ufffd" in p for p in pieces)


def test_unfinished_character():
    stream, _ = byte_stream()
    assert [stream.push(b) for b in b"a\xf0\x9f"] == ["a", "", ""]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""
    assert stream.push(ord("b")) == "b"


@pytest.mark.parametrize("data", [b"text " * 400, b"\x80" * 2000], ids=["text", "no_text"])
def test_cost_per_token_is_bounded(data):
    stream, calls = byte_stream()
    text = "".join(map(stream.push, data)) + stream.flush()
    assert text == data.decode(errors="replace")
    assert max(calls) <= 64


def test_skipped_tokens():
    stream, _ = byte_stream()
    assert [stream.push(i) for i in (300, 104, 300, 105)] == ["", "h", "", "i"]


def test_first_token_is_special_to_the_decoder():
    """SentencePiece's decoder drops the first space of a text, not of a piece."""
    words = ["\u2581a", "\u2581b", "\u2581", "c"]
    decode = lambda ids: "".join(words[i] for i in ids).replace("\u2581", " ").removeprefix(" ")
    stream = TextStream(decode)
    assert [stream.push(i) for i in (0, 1, 2, 3, 1)] == ["a", " b", " ", "c", " b"]
