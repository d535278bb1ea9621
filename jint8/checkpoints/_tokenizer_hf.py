"""The tokenizer of a Hugging Face directory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jint8.checkpoints._json import read_json
from jint8.checkpoints._optional import require
from jint8.checkpoints._tokenizer import Tokenizer


def tokenizer_from_directory(path: Path, config: Mapping[str, Any]) -> Tokenizer | None:
    """Build the tokenizer from `tokenizer.json` and the small files beside it.

    Args:
        path: The directory.
        config: The model's configuration, for the end of text where nothing else says it.

    Returns:
        The tokenizer, or None where there is no `tokenizer.json`.

    Raises:
        ValueError: If a file doesn't parse; the message names it.
    """
    file = path / "tokenizer.json"
    if not file.exists():
        return None
    tokenizers = require("tokenizers")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as e:  # the package raises bare Exception
        raise ValueError(f"{file}: Expected a tokenizer, got one that doesn't parse: {e}") from e
    settings = {
        **read_json(path / "special_tokens_map.json", optional=True),
        **read_json(path / "tokenizer_config.json", optional=True),
    }

    def token_id(name: str) -> int | None:
        token = settings.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        return backend.token_to_id(content) if isinstance(content, str) else None

    eos = [token_id("eos_token"), *_ids(read_json(path / "generation_config.json", optional=True).get("eos_token_id"))]
    eos_ids = [i for i in eos if i is not None] or _ids(config.get("eos_token_id"))
    return Tokenizer(
        backend,
        bos_id=token_id("bos_token"),
        eos_ids=eos_ids,
        pad_id=token_id("pad_token"),
        chat_template=_chat_template(path, settings),
    )


def _chat_template(path: Path, settings: Mapping[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template") or read_json(path / "chat_template.json", optional=True).get(
        "chat_template"
    )
    if isinstance(template, list):  # several templates with names
        named = {t["name"]: t["template"] for t in template}
        return named.get("default")
    return template


def _ids(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]
