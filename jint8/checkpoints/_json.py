"""JSON and text out of files, with errors that name them."""

import json
from pathlib import Path
from typing import Any


def read_json(file: Path, *, optional: bool = False) -> dict[str, Any]:
    """Read a JSON object.

    Args:
      file: the file.
      optional: whether a missing file reads as `{}`.

    Returns:
      The object.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: it holds no JSON object.
    """
    if not file.exists():
        if optional:
            return {}
        raise FileNotFoundError(f"{file}: Expected this file, got none")
    return parse_json(file.read_bytes(), file)


def parse_json(raw: bytes, file: Path, what: str = "JSON") -> dict[str, Any]:
    """Parse a JSON object in UTF-8.

    Args:
      raw: its bytes.
      file: the file that they are from.
      what: what the error says was expected.

    Returns:
      The object.

    Raises:
      ValueError: it is no JSON object, or one that is nested more deeply than Python's parser goes.
    """
    try:
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file}: Expected {what}, got something that doesn't parse: {e}") from e
    if not isinstance(value, dict):
        raise ValueError(f"{file}: Expected a JSON object, got {type(value).__name__}")
    return value


def read_text(file: Path) -> str:
    """Read a text in UTF-8, with every kind of line break as a line feed.

    Args:
      file: the file.

    Returns:
      The text.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: it isn't UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{file}: Expected text in UTF-8, got other bytes: {e}") from e
