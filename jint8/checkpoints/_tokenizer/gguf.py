"""The tokenizer that a GGUF file has in its metadata."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jint8.checkpoints._optional import require
from jint8.checkpoints._tokenizer.pretokenizers import PRE_TOKENIZERS, build_pre_tokenizer
from jint8.checkpoints._tokenizer.tokenizer import Tokenizer

# llama.cpp's token types (5 stands for unused tokens).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
SPACE = "\u2581"  # how SentencePiece writes a space
# A file names one token that ends a text, but chat models end a turn with another one, which many files don't name.
# As llama.cpp does, find it by its text.
END_OF_TURN = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "</s>",
)  # fmt: skip


def tokenizer_from_metadata(metadata: Mapping[str, Any], *, path: Path) -> Tokenizer | None:
    """Build the tokenizer.

    Args:
      metadata: the file's metadata.
      path: the file, for messages.

    Returns:
      The tokenizer, or None where the file has none.

    Raises:
      ValueError: its kind isn't known, or a part is missing. A pre-tokenizer that isn't known is a warning at the first
        use.
    """
    try:
        return _from_metadata(metadata, path)
    except (ImportError, ValueError):
        raise
    except Exception as e:  # the tokenizers package raises bare Exception
        raise ValueError(f"{path}: Expected metadata of a tokenizer, got a value of another kind in them: {e!r}") from e


def _from_metadata(metadata: Mapping[str, Any], path: Path) -> Tokenizer | None:
    model = metadata.get("tokenizer.ggml.model")
    if model in (None, "none", "no_vocab"):
        return None
    if model not in _BUILDERS:
        raise ValueError(f"{path}: Expected a tokenizer.ggml.model among {', '.join(_BUILDERS)}, got {model!r}")
    tokens = _required(metadata, "tokens", path)
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ValueError(
            f"{path}: Expected distinct tokens with a type each, got {len(tokens)} tokens, {len(set(tokens))} of them "
            f"distinct, and {len(types)} types"
        )
    backend, add_bos = _BUILDERS[model](metadata, tokens, types, path)
    _add_special(backend, tokens, types)

    def token_id(name: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None and not 0 <= value < len(tokens):
            raise ValueError(f"{path}: Expected a {name}_token_id below {len(tokens)}, got {value}")
        return value

    bos, eos = token_id("bos"), token_id("eos")
    _add_ends(
        backend,
        tokens,
        bos if metadata.get("tokenizer.ggml.add_bos_token", add_bos) else None,
        eos if metadata.get("tokenizer.ggml.add_eos_token", False) else None,
    )
    kinds = {t: (CONTROL,) if t == "</s>" else (CONTROL, USER_DEFINED) for t in END_OF_TURN}  # in Gemma's it is a tag
    turns = [i for t, of in kinds.items() if (i := backend.token_to_id(t)) is not None and types[i] in of]
    ends = [i for i in (eos, token_id("eot"), token_id("eom"), *turns) if i is not None]
    return Tokenizer(
        backend,
        bos_id=bos,
        eos_ids=ends,
        pad_id=token_id("padding"),
        chat_template=metadata.get("tokenizer.chat_template"),
        tool_template=metadata.get("tokenizer.chat_template.tool_use"),
        doubt=_doubt(metadata, path) if model == "gpt2" else None,
    )


def _doubt(metadata: Mapping[str, Any], path: Path) -> str | None:
    """Why the tokens of a text may not be those that the model was trained on."""
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name in PRE_TOKENIZERS:
        return None
    return (
        f"{path}: Expected a tokenizer.ggml.pre among {', '.join(PRE_TOKENIZERS)}, got {name!r}: texts are cut into "
        "words as GPT-2 does, and may become other tokens than those that the model knows."
    )


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], path: Path) -> Any:
    """GPT-2's kind: BPE on bytes, which are written as printable characters; earlier merges come first."""
    tokenizers, models, decoders = require("tokenizers"), require("tokenizers.models"), require("tokenizers.decoders")
    kind = PRE_TOKENIZERS.get(metadata.get("tokenizer.ggml.pre", "default"), PRE_TOKENIZERS["gpt-2"])
    vocab = {t: i for i, t in enumerate(tokens)}
    merges = [tuple(m.split(" ", 1)) for m in _required(metadata, "merges", path)]
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocab.keys():
            raise ValueError(f"{path}: Expected merges of two tokens into a third, got {' '.join(merge)!r}")
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=kind.ignore_merges))
    if kind.nfc:
        backend.normalizer = require("tokenizers.normalizers").NFC()
    backend.pre_tokenizer = build_pre_tokenizer(kind)
    backend.decoder = decoders.ByteLevel()
    return backend, kind.add_bos


def _sentence_piece(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], path: Path) -> Any:
    """SentencePiece's BPE: pieces with scores, spaces written as U+2581, unknown characters as bytes."""
    tokenizers, models = require("tokenizers"), require("tokenizers.models")
    normalizers, decoders = require("tokenizers.normalizers"), require("tokenizers.decoders")
    scores, unknown = _scores(metadata, tokens, path)
    pieces = {t: s for t, s, kind in zip(tokens, scores, types, strict=True) if kind not in (UNKNOWN, CONTROL, BYTE)}
    vocab = {t: i for i, t in enumerate(tokens)}
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab, merges_from_scores(pieces, vocab), unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True
        )
    )
    # SentencePiece puts a space before a text, so that its first word is the token it is elsewhere; decoding strips it.
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    backend.normalizer = normalizers.Sequence(
        [*_normalizers(metadata, remove_spaces=False)]
        + [normalizers.Prepend(SPACE)] * prefix
        + [normalizers.Replace(" ", SPACE)]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()] + [decoders.Strip(" ", 1, 0)] * prefix
    )
    return backend, True


def _unigram(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], path: Path) -> Any:
    """SentencePiece's unigram model: of all ways to cut a text into pieces, the one of the largest sum of scores."""
    tokenizers, models, pre = require("tokenizers"), require("tokenizers.models"), require("tokenizers.pre_tokenizers")
    normalizers, decoders = require("tokenizers.normalizers"), require("tokenizers.decoders")
    scores, unknown = _scores(metadata, tokens, path)
    pieces = list(zip(tokens, map(float, scores), strict=True))
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=unknown, byte_fallback=BYTE in types))
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    backend.normalizer = normalizers.Sequence(_normalizers(metadata, remove_spaces=True))
    scheme = "always" if prefix else "never"
    backend.pre_tokenizer = pre.Metaspace(replacement=SPACE, prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme=scheme)
    return backend, False


def _scores(metadata: Mapping[str, Any], tokens: Sequence[str], path: Path) -> tuple[Sequence[float], int]:
    """A SentencePiece model's score of each token, and which one stands for unknown characters."""
    scores = _required(metadata, "scores", path)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    if len(scores) != len(tokens) or not 0 <= unknown < len(tokens):
        raise ValueError(
            f"{path}: Expected a score for each of {len(tokens)} tokens and an unknown token among them, got "
            f"{len(scores)} scores and {unknown}"
        )
    return scores, unknown


def _normalizers(metadata: Mapping[str, Any], *, remove_spaces: bool) -> list[Any]:
    """The normalizers of a SentencePiece model: its table of characters, and spaces at the ends and in a row.

    `remove_spaces` is whether such spaces are removed where the metadata doesn't say so.
    """
    tokenizers, normalizers = require("tokenizers"), require("tokenizers.normalizers")
    steps = []
    if len(table := metadata.get("tokenizer.ggml.precompiled_charsmap", b"")):
        steps.append(normalizers.Precompiled(bytes(table)))
    if metadata.get("tokenizer.ggml.remove_extra_whitespaces", remove_spaces):
        steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    return steps


_BUILDERS = {"gpt2": _byte_level, "llama": _sentence_piece, "t5": _unigram}


def merges_from_scores(scores: Mapping[str, float], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Turn SentencePiece's scores into BPE merges.

    SentencePiece joins the neighbours whose union is the piece of the highest score; as merges, every way to cut a
    piece into two, in the order of the pieces' scores (then of the parts' ids, as transformers has it).

    Args:
      scores: the pieces that may come out of a merge, with their scores.
      vocab: the pieces' ids.

    Returns:
      The merges, the first to be done first.

    Examples:
      >>> from jint8.checkpoints._tokenizer.gguf import merges_from_scores
      >>> scores = {"a": -3.0, "b": -4.0, "ab": -1.0, "aba": -2.0}
      >>> merges_from_scores(scores, {t: i for i, t in enumerate(scores)})
      [('a', 'b'), ('ab', 'a')]
    """
    merges = [
        (-score, vocab[left], vocab[right], left, right)
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if (left := piece[:cut]) in scores and (right := piece[cut:]) in scores
    ]
    return [merge[3:] for merge in sorted(merges)]


def _add_special(backend: Any, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Have the tokens that aren't made by merges, such as `<|im_start|>`, found in the text before it is cut."""
    added = require("tokenizers").AddedToken

    def of(kinds: tuple[int, ...], special: bool) -> list[Any]:
        return [added(t, normalized=False, special=special) for t, k in zip(tokens, types, strict=True) if k in kinds]

    backend.add_special_tokens(of((CONTROL, UNKNOWN), True))
    backend.add_tokens(of((USER_DEFINED,), False))


def _add_ends(backend: Any, tokens: Sequence[str], bos: int | None, eos: int | None) -> None:
    """Put BOS before and EOS behind every text, where they are given."""
    first, last = ([] if i is None else [(tokens[i], i)] for i in (bos, eos))
    if first or last:
        template = [*(token for token, _ in first), "$A", *(token for token, _ in last)]
        backend.post_processor = require("tokenizers.processors").TemplateProcessing(
            single=template, special_tokens=first + last
        )


def _required(metadata: Mapping[str, Any], name: str, path: Path) -> Any:
    key = f"tokenizer.ggml.{name}"
    if key not in metadata:
        raise ValueError(f"{path}: Expected the metadata {key}, got none")
    return metadata[key]
