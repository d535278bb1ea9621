"""A `QTensor`'s static fields as JSON: what `jint8.save`, `flax.serialization` and `jax.export` write of them.

Importing this file tells `jax.export` of `QTensor`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
from jax import export

from jint8._core.config import FOUR_BIT_OPTIONS, Config
from jint8._core.qtensor import STATIC_FIELDS, QTensor


def config_to_json(config: Config) -> dict[str, Any]:
    """A `Config`'s options, as values that JSON has.

    `rotate` only where it isn't 0, and what is of four bits only there: jint8 0.1.0, which doesn't know them, reads
    everything else.
    """
    unknown = {*(() if config.rotate else ("rotate",)), *(() if config.four_bits else FOUR_BIT_OPTIONS)}
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in unknown}


def config_from_json(options: Any) -> Config:
    """The inverse of `config_to_json`. Options that are missing have their defaults, as in files from before they came.

    Raises:
      ValueError: an option that `Config` doesn't know, or something else than options.
      TypeError, ValueError: a value that `Config` refuses.
    """
    if not isinstance(options, dict):
        raise ValueError(f"Expected a Config's options by name, got {options!r}.")
    _refuse_unknown("options of a Config", options, [field.name for field in dataclasses.fields(Config)])
    return Config(**options)


def static_to_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that `STATIC_FIELDS` names, as values that JSON has; `features` only of four-bit weights."""
    fields = {name: value for name, value in fields.items() if name != "features" or value is not None}
    return {**fields, "dtype": jnp.dtype(fields["dtype"]).name, "config": config_to_json(fields["config"])}


def static_from_json(fields: Any) -> dict[str, Any]:
    """The inverse of `static_to_json`: arguments of `QTensor`.

    Raises:
      ValueError: a field that `QTensor` doesn't have, or `dtype` or `config` is missing; the message names it.
      TypeError, ValueError: a value that isn't one of its field.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"Expected a QTensor's static fields by name, got {fields!r}.")
    _refuse_unknown("static fields of a QTensor", fields, STATIC_FIELDS)
    if missing := sorted({"dtype", "config"} - fields.keys()):
        raise ValueError(f"Expected a QTensor's {' and '.join(missing)}, got {', '.join(fields) or 'nothing'}.")
    order = fields.get("order")
    if order is not None and sorted(order) != list(range(len(order))):
        raise ValueError(f"Expected order to be a permutation of a QTensor's axes, got {order}.")
    features = fields.get("features")
    if features is not None and (isinstance(features, bool) or not isinstance(features, int) or features < 1):
        raise ValueError(f"Expected features to be a number of features, got {features!r}.")
    static = {**fields, "dtype": jnp.dtype(fields["dtype"]), "config": config_from_json(fields["config"])}
    # JSON has lists; fields are compared and hashed, for which they have to be tuples.
    return static | {name: tuple(static[name]) for name in ("order", "stack") if static.get(name) is not None}


def static_to_text(fields: Mapping[str, Any]) -> str:
    """`static_to_json`, as text."""
    return json.dumps(static_to_json(fields))


def static_from_text(text: str) -> dict[str, Any]:
    """The inverse of `static_to_text`: arguments of `QTensor`. Raises as `static_from_json`."""
    return static_from_json(json.loads(text))


def _refuse_unknown(what: str, found: Mapping[str, Any], known: Collection[str]) -> None:
    if unknown := sorted(found.keys() - set(known)):
        raise ValueError(f"Expected {what} among {', '.join(known)}, got {', '.join(unknown)}.")


def _serialize(static: tuple[Any, ...]) -> bytes:
    return static_to_text(dict(zip(STATIC_FIELDS, static, strict=True))).encode()


def _deserialize(text: bytes | bytearray) -> tuple[Any, ...]:
    fields = static_from_text(bytes(text).decode())
    return tuple(fields.get(name) for name in STATIC_FIELDS)


export.register_pytree_node_serialization(
    QTensor, serialized_name="jint8.QTensor", serialize_auxdata=_serialize, deserialize_auxdata=_deserialize
)
