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
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SEED = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
# DeepSeek's lists: letters that have a case, punctuation, and Chinese, Japanese and Korean characters.
_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386"
    "\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba"
    "\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184"
    "\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK = (
    "[\r\n]", rf"\s?[{_CASED}]+", "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+", r"\s+$",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}+",
)  # fmt: skip
_DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")


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
    PreTokenizer(patterns=(_GPT2,), names=("gpt-2", "phi-2", "mpt", "exaone4", "trillion", "granite-docling")),
    PreTokenizer(patterns=(_GPT2,), names=("olmo",), nfc=True),
    PreTokenizer(patterns=(r"\p{N}", _GPT2), names=("smollm", "starcoder", "refact", "codeshell", "minerva-7b")),
    PreTokenizer(patterns=(_LLAMA3,), names=("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"),
                 ignore_merges=True, add_bos=True),
    PreTokenizer(patterns=(_LLAMA3,), names=("dbrx", "smaug-bpe")),
    PreTokenizer(patterns=(_QWEN2,), names=("qwen2", "deepseek-r1-qwen"), nfc=True),
    PreTokenizer(patterns=(_QWEN2,), names=("stablelm2", "megrez")),
    PreTokenizer(patterns=(_TEKKEN,), names=("tekken",), ignore_merges=True, add_bos=True),
    PreTokenizer(patterns=(_O200K,), names=("gpt-4o",)),
    PreTokenizer(patterns=(_SEED,), names=("seed-coder",)),
    PreTokenizer(patterns=(_BLOOM,), names=("bloom", "gpt3-finnish", "poro-chat")),
    PreTokenizer(patterns=(_BLOOM, r"\p{N}"), names=("viking",)),
    PreTokenizer(patterns=_DEEPSEEK, names=("deepseek-llm",)),
    PreTokenizer(patterns=_DEEPSEEK_CODER, names=("deepseek-coder",)),
)  # fmt: skip
PRE_TOKENIZERS = {name: kind for kind in _KINDS for name in kind.names}


def build_pre_tokenizer(kind: PreTokenizer) -> Any:
    """Make the `tokenizers` object that cuts by the patterns and then writes bytes as characters."""
    tokenizers, pre = require("tokenizers"), require("tokenizers.pre_tokenizers")
    cuts = [pre.Split(tokenizers.Regex(p), behavior="isolated") for p in kind.patterns]
    return pre.Sequence([*cuts, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
