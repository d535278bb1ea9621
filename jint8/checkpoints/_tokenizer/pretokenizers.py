"""Where llama.cpp's named pre-tokenizers cut a text into words for byte-level BPE.

A GGUF file doesn't have the regular expressions, only a name that stands for them. Those here are llama.cpp's
(`llama-vocab.cpp`), in the form of each model's `tokenizer.json`; each one cuts the pieces that the one before it left.
"""

import dataclasses
from typing import Any

from jint8.checkpoints._optional import require

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _WORDS
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _WORDS
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """One kind of pre-tokenizer.

    Attributes:
      patterns: the regular expressions.
      names: the names in GGUF files that stand for it.
      nfc: whether the text is brought into Unicode's composed form first.
      ignore_merges: whether a word that is a token is never split.
      add_bos: whether texts begin with BOS unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    names: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_KINDS = (
    PreTokenizer(patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"), names=("default",)),
    PreTokenizer(patterns=(_GPT2,), names=("gpt-2", "phi-2", "mpt", "exaone4")),
    PreTokenizer(patterns=(_GPT2,), names=("olmo",), nfc=True),
    PreTokenizer(patterns=(r"\p{N}", _GPT2), names=("smollm", "starcoder", "refact", "codeshell")),
    PreTokenizer(patterns=(_LLAMA3,), names=("llama-bpe", "llama3", "llama-v3", "falcon3"), ignore_merges=True,
                 add_bos=True),
    PreTokenizer(patterns=(_LLAMA3,), names=("dbrx", "smaug-bpe")),
    PreTokenizer(patterns=(_QWEN2,), names=("qwen2", "deepseek-r1-qwen"), nfc=True),
    PreTokenizer(patterns=(_TEKKEN,), names=("tekken",), ignore_merges=True, add_bos=True),
)  # fmt: skip
PRE_TOKENIZERS = {name: kind for kind in _KINDS for name in kind.names}


def build_pre_tokenizer(kind: PreTokenizer) -> Any:
    """Make the `tokenizers` object that cuts by the patterns and then writes bytes as characters."""
    tokenizers, pre = require("tokenizers"), require("tokenizers.pre_tokenizers")
    cuts = [pre.Split(tokenizers.Regex(p), behavior="isolated") for p in kind.patterns]
    return pre.Sequence([*cuts, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
