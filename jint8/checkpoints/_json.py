"""JSON files with errors that name them."""

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
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{file}: Expected JSON, got something else: {e}") from e
    if not isinstance(value, dict):
        raise ValueError(f"{file}: Expected a JSON object, got {type(value).__name__}")
    return value
