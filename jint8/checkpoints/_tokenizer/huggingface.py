"""The tokenizer of a Hugging Face directory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jint8.checkpoints._json import read_json
from jint8.checkpoints._optional import require
from jint8.checkpoints._tokenizer.tokenizer import Tokenizer


def tokenizer_from_directory(path: Path, config: Mapping[str, Any]) -> Tokenizer | None:
    """Build the tokenizer from `tokenizer.json` (or GPT-2's two files) and the small files beside it.

    Args:
      path: the directory.
      config: the model's configuration, for the end of text where nothing else says it.

    Returns:
      The tokenizer, or None where there is neither.

    Raises:
      ValueError: a file doesn't parse; the message names it.
    """
    settings = {
        **read_json(path / "special_tokens_map.json", optional=True),
        **read_json(path / "tokenizer_config.json", optional=True),
    }
    if (path / "tokenizer.json").exists():
        backend = backend_from_file(path / "tokenizer.json")
    elif (path / "vocab.json").exists() and settings.get("tokenizer_class") in ("GPT2Tokenizer", "GPT2TokenizerFast"):
        backend = _from_vocabulary(path, settings)
    else:
        return None

    def token_id(name: str) -> int | None:
        content = _content(settings.get(name))
        return None if content is None else backend.token_to_id(content)

    eos = [token_id("eos_token"), *_ids(read_json(path / "generation_config.json", optional=True).get("eos_token_id"))]
    eos_ids = [i for i in eos if i is not None] or _ids(config.get("eos_token_id"))
    return Tokenizer(
        backend,
        bos_id=token_id("bos_token"),
        eos_ids=eos_ids,
        pad_id=token_id("pad_token"),
        chat_template=_chat_template(path, settings),
    )


def backend_from_file(file: Path) -> Any:
    """Read a `tokenizer.json`. Raises ValueError where it doesn't parse."""
    tokenizers = require("tokenizers")
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as e:  # the tokenizers package raises bare Exception
        raise ValueError(f"{file}: Expected a tokenizer, got one that doesn't parse: {e}") from e


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


def _chat_template(path: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template, of which newer versions of transformers made a file of its own."""
    file = path / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    other = read_json(path / "chat_template.json", optional=True)
    template = settings.get("chat_template") or other.get("chat_template")
    if isinstance(template, list):  # several templates with names, such as "default" and "tool_use"
        named = {t["name"]: t["template"] for t in template}
        return named.get("default")
    return template


def _ids(value: Any) -> list[int]:
    """Token ids, which the files have as a number, as a list or as null."""
    return [] if value is None else list(value) if isinstance(value, list) else [value]
