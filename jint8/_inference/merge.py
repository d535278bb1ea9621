"""`jint8.merge_adapter`: an adapter's factors added to the weights beside them."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax

from jint8._convert.lora import FACTORS
from jint8._convert.merge import merged, placed_alike
from jint8._core.qtensor import is_qtensor
from jint8._inference.language_model import LanguageModel
from jint8._inference.text_encoder import TextEncoder
from jint8._trees.paths import leaf_paths

Model = TypeVar("Model", LanguageModel, TextEncoder)


def merge_adapter(loaded: Model) -> tuple[Model, dict[str, float]]:
    """A model with its adapter's factors added to the weights, and the error of each.

    Formula: `W + B A` in float32, rounded to the weight's dtype; an int8 weight is dequantized, added to, and quantized
    as it was. The error is `norm(result - (W + B A)) / norm(W + B A)`, in Frobenius norms.

    Args:
      loaded: from `jint8.load` or `jint8.load_encoder` with `adapter=`, or saved with its factors.

    Returns:
      The model without factors, which shares all other arrays, and the error of each merged weight by path. Merging
      rounds int8 weights once more; a checkpoint in floating point that PEFT merged and jint8 quantizes is nearer.

    Raises:
      ValueError: a model without an adapter, or a sum that isn't finite; the message names the weight.

    Examples:
      >>> import jint8
      >>> model = jint8.load("path/to/checkpoint", adapter="path/to/adapter")  # doctest: +SKIP
      >>> model, errors = jint8.merge_adapter(model)  # doctest: +SKIP
    """
    params = jax.tree.map(lambda leaf: leaf, loaded.params, is_leaf=is_qtensor)  # new dictionaries, the same arrays
    errors: dict[str, float] = {}
    for path, _ in leaf_paths(loaded.params, is_leaf=is_qtensor):
        module, _, name = path.rpartition("/")
        if name != FACTORS[0]:
            continue
        node: Any = params
        for parent in module.split("/"):
            node = node[parent]
        weight, down, up = node["weight"], *(node.pop(factor) for factor in FACTORS)
        try:
            result, errors[f"{module}/weight"] = merged(weight, down, up)
        except ValueError as error:
            raise ValueError(f"{module}/weight: {error}") from None
        node["weight"] = placed_alike(result, weight)
    if not errors:
        raise ValueError("Expected a model with an adapter, got one without.")
    return dataclasses.replace(loaded, params=params), errors
