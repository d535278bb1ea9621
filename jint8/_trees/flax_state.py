"""`QTensor` for `flax.serialization`: `to_state_dict`, `to_bytes` and their inverses.

Importing this registers the type: `jint8.linen` and `jint8.nnx` do, and `quantize_params` where Flax is imported.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import serialization

from jint8._core.qtensor import ARRAY_FIELDS, STATIC_FIELDS, QTensor
from jint8._core.static_fields import static_from_text, static_to_text


def to_state(w: QTensor) -> dict[str, Any]:
    """The arrays by name, and the static fields as one string."""
    arrays = {name: getattr(w, name) for name in ARRAY_FIELDS if getattr(w, name) is not None}
    return {**arrays, "static": static_to_text({name: getattr(w, name) for name in STATIC_FIELDS})}


def from_state(target: QTensor, state: dict[str, Any]) -> QTensor:
    """What was saved, with the static fields that it was saved with."""
    path = serialization.current_path()
    if not isinstance(state, dict) or not {"q", "scale", "static"} <= set(state):
        got = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{path}: Expected a saved QTensor (q, scale, static), got {got}.")
    if unknown := sorted(state.keys() - {*ARRAY_FIELDS, "static"}):
        raise ValueError(f"{path}: Expected {', '.join(ARRAY_FIELDS)} and static, got {', '.join(unknown)}.")
    if tuple(state["q"].shape) != tuple(target.q.shape):
        raise ValueError(f"{path}: Expected int8 values of shape {target.q.shape}, got {state['q'].shape}.")
    arrays: dict[str, Any] = {name: state.get(name) for name in ARRAY_FIELDS}
    try:
        static = static_from_text(state["static"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    return dataclasses.replace(target, **arrays, **static)


serialization.register_serialization_state(QTensor, to_state, from_state)
