"""What the `quantization_config` of a `config.json` asks for, whoever wrote it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from jint8._core.config import Config

ANY = None  # of a field: it says how weights came about, or nothing that changes a result
Known = Mapping[str, tuple[Any, ...] | None]  # for each field of an object the values that it may have, or `ANY`


@dataclasses.dataclass(frozen=True)
class Options:
    """What a `quantization_config` asks for.

    Attributes:
      method: the tool that it is of; None where there is no such configuration.
      config: how it has weights and activations multiplied; None where it doesn't say.
      skip: patterns of weights that stay in floating point.
      refused: why `config` is None, where the activations are to be quantized in a way that no scheme of ours does.
      static: whether scales of activations are stored beside the weights.
    """

    method: str | None = None
    config: Config | None = None
    skip: tuple[str, ...] = ()
    refused: str = ""
    static: bool = False


def check_fields(where: str, found: Any, known: Known, **missing: Any) -> dict[str, Any]:
    """Checks the fields of a JSON object against the values that each may have, so that none goes unread.

    Args:
      where: the object's name, for messages.
      found: the object.
      known: the fields that are known, and their values.
      missing: the values that fields have where they are left out, unless those are among the `known`.

    Returns:
      The object.

    Raises:
      ValueError: something else than an object, a field that isn't known, or another value; the message names it.
    """
    if not isinstance(found, dict):
        raise ValueError(f"Expected {where} to be an object, got {shown(found)}.")
    for name, value in (missing | found).items():
        if name not in known:
            raise ValueError(f"Expected {where} to have fields among {', '.join(known)}, got {shown(name)}.")
        allowed = known[name]
        if allowed is not ANY and value not in allowed:
            expected = " or ".join(map(shown, allowed))
            raise ValueError(f"Expected {where}.{name} to be {expected}, got {shown(value)}.")
    return found


def shown(value: Any) -> str:
    """A JSON value for a message, of which the beginning is enough."""
    try:
        text = json.dumps(value)
    except RecursionError:
        return "lists in lists"
    return text if len(text) <= 80 else f"{text[:80]}..."
