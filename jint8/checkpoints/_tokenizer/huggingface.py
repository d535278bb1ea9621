"""The tokenizer of a Hugging Face directory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jint8.checkpoints._json import read_json, read_text
from jint8.checkpoints._optional import require
from jint8.checkpoints._tokenizer.gguf import tokenizer_from_metadata
from jint8.checkpoints._tokenizer.sentencepiece import metadata_of_sentencepiece
from jint8.checkpoints._tokenizer.tokenizer import Tokenizer


def tokenizer_from_directory(path: Path, config: Mapping[str, Any]) -> Tokenizer | None:
    """Build the tokenizer from `tokenizer.json` (or `tokenizer.model`, or GPT-2's two files) and the files beside it.

    Args:
      path: the directory.
      config: the model's configuration, for the end of text where nothing else says it.

    Returns:
      The tokenizer, or None where there is neither.

    Raises:
      ValueError: a file doesn't parse; the message names it, or the directory where values of several are at odds.
    """
    try:
        return _from_directory(path, config)
    except (AttributeError, LookupError, OverflowError, TypeError, UnicodeEncodeError) as e:
        raise ValueError(f"{path}: Expected files of a tokenizer, got a value of another kind in them: {e!r}") from e


def _from_directory(path: Path, config: Mapping[str, Any]) -> Tokenizer | None:
    settings = {
        **read_json(path / "special_tokens_map.json", optional=True),
        **read_json(path / "tokenizer_config.json", optional=True),
    }
    if (path / "tokenizer.json").exists():
        backend = backend_from_file(path / "tokenizer.json")
    elif (path / "tokenizer.model").exists():
        backend = _from_sentencepiece(path / "tokenizer.model", settings)
    elif (path / "vocab.json").exists() and settings.get("tokenizer_class") in ("GPT2Tokenizer", "GPT2TokenizerFast"):
        backend = _from_vocabulary(path, settings)
    else:
        return None

    add_tokens(backend, path, settings, rows=config.get("vocab_size", 0))

    def token_id(name: str) -> int | None:
        content = _content(settings.get(name))
        return None if content is None else backend.token_to_id(content)

    eos, ends = (
        token_id("eos_token"),
        _ids(read_json(path / "generation_config.json", optional=True).get("eos_token_id")),
    )
    if not ends and (eos is None or eos in _ids(config.get("eos_token_id"))):
        # The model's configuration, where no file for generation says it. One that contradicts the tokenizer is older.
        ends = _ids(config.get("eos_token_id"))
    templates = _chat_templates(path, settings)
    return Tokenizer(
        backend,
        bos_id=token_id("bos_token"),
        eos_ids=[i for i in (eos, *ends) if i is not None],
        pad_id=token_id("pad_token"),
        chat_template=templates.get("default"),
        tool_template=templates.get("tool_use"),
    )


def add_tokens(backend: Any, path: Path, settings: Mapping[str, Any], *, rows: int) -> None:
    """Add the tokens that only files beside `tokenizer.json` have.

    Args:
      backend: the tokenizer, which changes.
      path: the directory.
      settings: of `special_tokens_map.json` and `tokenizer_config.json`.
      rows: of the model's embedding; a special token of which only the text is known isn't added beyond.

    Raises:
      ValueError: a token would get another number than the files say.
    """
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    added = read_json(path / "added_tokens.json", optional=True)
    try:
        tokens = _tokens(settings, added)
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path}: Expected added tokens with a text and a number each, got {e!r}") from e
    missing = [pair for content, pair in tokens.items() if content not in known]
    # Tokens get the next free numbers one after the other. Those that no file has a number for come last.
    for number, token in sorted(missing, key=lambda pair: (pair[0] is None, pair[0])):
        if number is None and backend.token_to_id(token.content) is None and backend.get_vocab_size() >= rows:
            continue
        backend.add_special_tokens([token]) if token.special else backend.add_tokens([token])
        if number is not None and backend.token_to_id(token.content) != number:
            raise ValueError(
                f"{path}: Expected the added token {token.content!r} to have the number {number}, got "
                f"{backend.token_to_id(token.content)}, the next after those of tokenizer.json"
            )


def _tokens(settings: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, tuple[int | None, Any]]:
    """The tokens that the files name: by their text, the number where there is one, and what to add."""
    added_token = require("tokenizers").AddedToken
    tokens: dict[str, tuple[int | None, Any]] = {}
    for number, said in settings.get("added_tokens_decoder", {}).items():
        options = {name: value for name, value in said.items() if name != "content"}
        if unknown := options.keys() - {"special", "normalized", "lstrip", "rstrip", "single_word"}:
            raise ValueError(f"the option {min(unknown)!r} of {said['content']!r}")  # which tokenizers would ignore
        tokens[said["content"]] = (int(number), added_token(said["content"], **options))
    for content, number in added.items():
        tokens.setdefault(content, (int(number), added_token(content, normalized=False)))
    named = [settings.get(f"{name}_token") for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
    for value in [*named, *(settings.get("additional_special_tokens") or [])]:
        if (text := _content(value)) is not None:
            tokens.setdefault(text, (None, added_token(text, normalized=False, special=True)))
    return tokens


def backend_from_file(file: Path) -> Any:
    """Read a `tokenizer.json`. Raises ValueError where it doesn't parse."""
    tokenizers = require("tokenizers")
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as e:  # the tokenizers package raises bare Exception
        raise ValueError(f"{file}: Expected a tokenizer, got one that doesn't parse: {e}") from e


def _from_sentencepiece(file: Path, settings: Mapping[str, Any]) -> Any:
    """The tokenizer of a directory that has SentencePiece's file alone, as Llama 2's and Mistral's first ones."""
    metadata = metadata_of_sentencepiece(file)
    for name, default in (("bos", True), ("eos", False)):
        metadata[f"tokenizer.ggml.add_{name}_token"] = settings.get(f"add_{name}_token", default)
    tokenizer = tokenizer_from_metadata(metadata, path=file)
    assert tokenizer is not None
    return tokenizer.backend


def _from_vocabulary(path: Path, settings: Mapping[str, Any]) -> Any:
    """GPT-2's tokenizer from vocab.json and merges.txt: OPT has no tokenizer.json."""
    tokenizers, models = require("tokenizers"), require("tokenizers.models")
    try:
        model = models.BPE.from_file(str(path / "vocab.json"), str(path / "merges.txt"))
    except Exception as e:  # the tokenizers package raises bare Exception
        raise ValueError(f"{path}: Expected vocab.json with merges.txt, got files that don't parse: {e}") from e
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = require("tokenizers.pre_tokenizers").ByteLevel(add_prefix_space=False)
    backend.decoder = require("tokenizers.decoders").ByteLevel()
    special = [_content(settings.get(f"{name}_token")) for name in ("bos", "eos", "unk", "pad")]
    backend.add_special_tokens([token for token in special if token is not None])
    if settings.get("add_bos_token") and special[0] is not None:
        backend.post_processor = require("tokenizers.processors").TemplateProcessing(
            single=[special[0], "$A"], special_tokens=[(special[0], backend.token_to_id(special[0]))]
        )
    return backend


def _content(token: Any) -> str | None:
    """The text of a special token, which the files have as a string or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _chat_templates(path: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates by name, of which newer versions of transformers made files of their own."""
    file = path / "chat_template.jinja"
    other = read_json(path / "chat_template.json", optional=True)
    template = settings.get("chat_template") or other.get("chat_template")
    # several templates with names, such as "default" and "tool_use"; or one alone
    named = {t["name"]: t["template"] for t in template} if isinstance(template, list) else {"default": template}
    if file.exists():
        named["default"] = read_text(file)
    return {name: template for name, template in named.items() if template is not None}


def _ids(value: Any) -> list[int]:
    """Token ids, which the files have as a number, as a list or as null."""
    return [] if value is None else list(value) if isinstance(value, list) else [value]
