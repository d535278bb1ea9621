"""Tokenizers of GGUF files against the same ones made by the tokenizers package."""

import itertools
import json
import unicodedata

import numpy as np
import pytest
from checkpoint_files import llama_metadata, llama_tensors, write_gguf
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from jint8.checkpoints import open_checkpoint
from jint8.checkpoints._tokenizer.pretokenizers import PRE_TOKENIZERS, build_pre_tokenizer

TEXTS = {
    "empty": "",
    "words": "Hello world, the quick brown fox's tail isn't WE'LL",
    "digits": "0 12 345 6789 1.5e10 ½ ² ٣٤",
    "spaces": "  two   three\n\n\ttab \r\n end  ",
    "code": "def f(x):\n    return x[1:] + {'a': 2}  # ok\n",
    "accents": "naïve café Ünïcode e\u0301",
    "cjk": "日本語のテキスト 한국어",
    "emoji": "👩‍👩‍👧 🤗!",
    "special": "<|im_start|>user\nhi<|im_end|> <|im_end",
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def split(pattern):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def digits():
    """As the tokenizer.json of SmolLM2 has it."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


# Each family's pre-tokenizer as its tokenizer.json describes it.
FAMILIES = {
    "gpt-2": (None, lambda: pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "smollm": (None, digits),
    "llama-bpe": (None, lambda: split(LLAMA3)),
    "qwen2": (normalizers.NFC, lambda: split(LLAMA3.replace("{1,3}", ""))),
}


def reference(pre, **options):
    normalizer, pre_tokenizer = FAMILIES[pre]
    backend = Tokenizer(models.BPE(**options))
    if normalizer:
        backend.normalizer = normalizer()
    backend.pre_tokenizer, backend.decoder = pre_tokenizer(), decoders.ByteLevel()
    return backend


def trained(pre):
    backend = reference(pre)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, min_frequency=1, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    backend.train_from_iterator(list(TEXTS.values()) * 2, trainer)
    return backend


def metadata_of(backend, pre):
    vocab = backend.get_vocab()
    tokens = sorted(vocab, key=vocab.get)
    merges = [" ".join(m) for m in json.loads(backend.to_str())["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges, "tokenizer.ggml.token_type": [3 if t in SPECIAL else 1 for t in tokens],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}",
    }  # fmt: skip


def open_tokenizer(tmp_path, metadata):
    tensors = llama_tensors(np.random.default_rng(0))
    path = write_gguf(tmp_path / "m.gguf", tensors, llama_metadata(**metadata))
    return open_checkpoint(path).tokenizer()


@pytest.mark.parametrize("pre", FAMILIES)
def test_byte_level(tmp_path, pre):
    backend = trained(pre)
    tok = open_tokenizer(tmp_path, metadata_of(backend, pre))
    assert (tok.bos_id, tok.eos_ids, tok.pad_id) == (1, (2, 0), 0)
    for name, text in TEXTS.items():
        ids = tok.encode(text)
        assert ids == backend.encode(text).ids, name
        expected = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
        assert tok.decode(ids, skip_special_tokens=False) == expected, name


def test_special_tokens(tmp_path):
    tok = open_tokenizer(tmp_path, metadata_of(trained("smollm"), "smollm"))
    ids = tok.encode("<|im_start|>hi<|im_end|>")
    assert (ids[0], ids[-1]) == (1, 2)
    assert tok.decode(ids) == "hi"
    assert tok.apply_chat_template([{"role": "user", "content": "hi"}]) == "<|im_start|>hi"


@pytest.mark.parametrize(
    ("pre", "flags", "ends"),
    [
        ("smollm", {"bos": None}, ([], [])),
        ("llama-bpe", {"bos": None}, ([1], [])),
        ("llama-bpe", {"bos": False}, ([], [])),
        ("smollm", {"bos": True, "eos": True}, ([1], [2])),
    ],
    ids=["default", "default_llama3", "no_bos", "bos_eos"],
)
def test_ends(tmp_path, pre, flags, ends):
    metadata = metadata_of(trained(pre), pre)
    metadata |= {f"tokenizer.ggml.add_{k}_token": v for k, v in flags.items()}
    tok = open_tokenizer(tmp_path, metadata)
    inner = tok.encode("Hello", add_special_tokens=False)
    assert tok.encode("Hello") == ends[0] + inner + ends[1]


def test_default_pre_tokenizer(tmp_path):
    metadata = metadata_of(trained("gpt-2"), None)
    tok = open_tokenizer(tmp_path, metadata)
    cut = [piece for piece, _ in tok.backend.pre_tokenizer.pre_tokenize_str("ab 12345, c")]
    assert cut == ["ab", "Ġ", "123", "45", ",", "Ġc"]


PIECES = {
    "a": -3.0,
    "b": -4.0,
    "ab": -1.0,
    "ba": -2.0,
    "aba": -1.5,
    "\u2581": -5.0,
    "\u2581a": -0.5,
    "aa": -2.5,
    "é": -6.0,
}


def sentence_piece(text, ids):
    """SentencePiece's algorithm as it is defined: join the best pair, the leftmost of equals, until there is none."""
    parts = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        pairs = [(PIECES.get(a + b), -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in PIECES]
        if not pairs:
            break
        i = -max(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    out = []
    for part in parts:
        out += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return out


def sentence_piece_metadata():
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *PIECES, "<start_of_turn>"]
    types = [2, 3, 3, *[6] * 256, *[1] * len(PIECES), 4]
    scores = [0.0] * 259 + [*PIECES.values(), 0.0]
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    "text", ["a", "ab ba", "abab aabba", "aaaa", "  a", "é", "x日🤗b", "b\na", "<0x41>"], ids=ascii
)
def test_sentence_piece(tmp_path, text):
    metadata = sentence_piece_metadata()
    tok = open_tokenizer(tmp_path, metadata)
    ids = {t: i for i, t in enumerate(metadata["tokenizer.ggml.tokens"])}
    got = tok.encode(text)
    assert got == [1, *sentence_piece(text, ids)]
    assert tok.decode(got) == text
    stream = tok.stream()
    assert "".join(map(stream.push, got)) + stream.flush() == text


def test_sentence_piece_without_prefix(tmp_path):
    metadata = sentence_piece_metadata()
    tok = open_tokenizer(tmp_path, metadata | {"tokenizer.ggml.add_space_prefix": False})
    ids = tok.encode("<start_of_turn> a", add_special_tokens=False)
    assert ids == [metadata["tokenizer.ggml.tokens"].index(t) for t in ("<start_of_turn>", "\u2581a")]
    assert tok.decode(ids) == "<start_of_turn> a"


def test_no_tokenizer(tmp_path):
    assert open_tokenizer(tmp_path, {}) is None


FAULTS = {
    "model": ({"model": "rwkv"}, "tokenizer.ggml.model among gpt2, llama, t5, got 'rwkv'"),
    "tokens": ({"tokens": None}, "tokenizer.ggml.tokens, got none"),
    "merges": ({"merges": None}, "tokenizer.ggml.merges, got none"),
    "merge_of_unknown": ({"merges": ["a nothing"]}, "Expected merges"),
    "merge_of_one": ({"merges": ["a"]}, "Expected merges"),
    "types": ({"token_type": [1]}, "and 1 types"),
    "eos": ({"eos_token_id": 99999}, "Expected a eos_token_id below"),
}


@pytest.mark.parametrize(("changes", "message"), FAULTS.values(), ids=FAULTS)
def test_fault(tmp_path, changes, message):
    metadata = metadata_of(trained("smollm"), "smollm")
    metadata |= {f"tokenizer.ggml.{k}": v for k, v in changes.items()}
    with pytest.raises(ValueError, match=message) as e:
        open_tokenizer(tmp_path, metadata)
    assert "m.gguf" in str(e.value)


def test_unknown_pre_tokenizer(tmp_path):
    """The model is of use without its tokenizer; whoever uses it is told once."""
    metadata = metadata_of(trained("smollm"), "smollm") | {"tokenizer.ggml.pre": "kimi-k2"}
    tok = open_tokenizer(tmp_path, metadata)
    with pytest.warns(UserWarning, match=r"m\.gguf: Expected a tokenizer.ggml.pre among .*smollm.*, got 'kimi-k2'"):
        ids = tok.encode("a word")
    assert tok.encode("a word") == ids
    assert tok.decode(ids) == "a word"


# What the regular expressions of the models' tokenizer.json make of a text, worked out by hand.
WORDS = {
    "bloom": ["Hello", ",", " World's", " 1234", " caf\u00e9s", "\u3002\n\n", " x_y"],
    "viking": ["Hello", ",", " World's", " ", "1", "2", "3", "4", " caf\u00e9s", "\u3002\n\n", " x_y"],
    "gpt-4o": ["Hello", ",", " World's", " ", "123", "4", " caf\u00e9s", "\u3002\n\n", " x", "_y"],
    "seed-coder": ["Hello", ",", " World", "'s", " ", "1", "2", "3", "4", " caf\u00e9s", "\u3002", "\n\n", " x", "_y"],
    "deepseek-coder": ["Hello", ",", " World", "'", "s", " ", "1", "2", "3", "4", " caf\u00e9s", "\u3002", "\n", "\n",
                       " x", "_", "y"],
    "deepseek-llm": ["Hello", ",", " World", "'", "s", " ", "1234", " caf", "\u00e9", "s", "\u3002", "\n", "\n",
                     " x", "_", "y"],
    "pixtral": ["Hello", ",", " World", "'s", " ", "123", "4", " caf\u00e9s", "\u3002\n\n", " x", "_y"],
    "stablelm2": ["Hello", ",", " World", "'s", " ", "1", "2", "3", "4", " caf\u00e9s", "\u3002\n\n", " x", "_y"],
}  # fmt: skip


@pytest.mark.parametrize("pre", WORDS)
def test_words(pre):
    text = "Hello, World's 1234 caf\u00e9s\u3002\n\n x_y"
    cut = build_pre_tokenizer(PRE_TOKENIZERS[pre]).pre_tokenize_str(text)
    assert [text[slice(*span)] for _, span in cut] == WORDS[pre]


def test_a_tag_is_no_end(tmp_path):
    """`</s>` ends a text where it is a control token; in Gemma's vocabulary it is HTML."""
    metadata = metadata_of(trained("smollm"), "smollm")
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "</s>"]
    number = len(metadata["tokenizer.ggml.tokens"]) - 1
    for kind, ends in ((3, True), (4, False)):
        types = [*metadata["tokenizer.ggml.token_type"], kind]
        tok = open_tokenizer(tmp_path, metadata | {"tokenizer.ggml.token_type": types})
        assert (number in tok.eos_ids) == ends


def test_scores_missing(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.scores, got none"):
        open_tokenizer(tmp_path, sentence_piece_metadata() | {"tokenizer.ggml.scores": None})
    with pytest.raises(ValueError, match="got 1 scores"):
        open_tokenizer(tmp_path, sentence_piece_metadata() | {"tokenizer.ggml.scores": [0.5]})
