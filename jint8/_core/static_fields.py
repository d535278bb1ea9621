"""A `QTensor`'s static fields as text, for what saves trees; `jax.export` learns of it here."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax.numpy as jnp
from jax import export

from jint8._core.config import Config
from jint8._core.qtensor import STATIC_FIELDS, QTensor


def static_to_text(fields: dict[str, Any]) -> str:
    """The fields that aren't arrays, as JSON."""
    return json.dumps(
        {**fields, "dtype": jnp.dtype(fields["dtype"]).name, "config": dataclasses.asdict(fields["config"])}
    )


def static_from_text(text: str) -> dict[str, Any]:
    """The inverse of `static_to_text`: arguments of `QTensor`."""
    fields = json.loads(text)
    order = fields["order"]
    return {
        "dtype": jnp.dtype(fields["dtype"]),
        "config": Config(**fields["config"]),
        "order": None if order is None else tuple(order),
        "stack": tuple(fields["stack"]),
    }


def _serialize(static: Any) -> bytes:
    return static_to_text(dict(zip(STATIC_FIELDS, static, strict=True))).encode()


def _deserialize(text: bytes | bytearray) -> tuple[Any, ...]:
    fields = static_from_text(bytes(text).decode())
    return tuple(fields[name] for name in STATIC_FIELDS)


export.register_pytree_node_serialization(
    QTensor, serialized_name="jint8.QTensor", serialize_auxdata=_serialize, deserialize_auxdata=_deserialize
)
