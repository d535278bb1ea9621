"""Which int8 layer replaces a layer of nnx."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from flax import nnx

from jint8._core.qtensor import QTensor
from jint8.nnx._modules import Int8Einsum, Int8Embed, Int8Linear, Int8LinearGeneral, Int8LoRALinear


class QuantizeWeight(Protocol):
    """What a converter gets weights from."""

    def __call__(
        self,
        name: str,
        contract_axes: tuple[int, ...],
        shape: tuple[int, ...] | None = None,
        stacked: tuple[int, ...] = (),
    ) -> QTensor | None:
        """The layer's weight `name` as a `QTensor`, or None where it is to stay in floating point.

        A plan overrules `contract_axes` and `stacked`, which are axes of one layer's weight: `stacked` are those that
        the product batches, such as experts. `shape` is that weight's: further axes in front are stacked too.
        """


Converter = Callable[[Any, QuantizeWeight], Any]

_CONVERTERS: dict[type, Converter] = {}


def register(layer_type: type[nnx.Module], converter: Converter | None = None) -> Any:
    """Teaches `jint8.nnx.quantize` a layer.

    The converter is called as `converter(layer, quantize)`, gets the weight from
    `quantize(name, contract_axes=..., stacked=())` (a `QTensor`, or None where it is to stay in floating point), and
    returns the module that replaces the layer: one of `jint8.nnx`, or one of your own that computes with
    `jint8.einsum`. `stacked` names the axes of independent matrices (experts), if there are any: schemes with one scale
    per tensor give each its own, and each may have its own outliers. Subclasses that override `__call__` aren't
    converted.

    Args:
      layer_type: an nnx module class.
      converter: the function; None returns a decorator.

    Returns:
      The converter, or a decorator for it.

    Raises:
      TypeError: `layer_type` isn't an nnx module class or `converter` isn't callable.

    Examples:
      >>> import jax.numpy as jnp, jint8
      >>> from flax import nnx
      >>> class Mine(nnx.Module):
      ...     def __init__(self):
      ...         self.w = nnx.Param(jnp.ones((4, 2, 3)))
      ...     def __call__(self, x):
      ...         return jnp.einsum("td,dnh->tnh", x, self.w[...])
      >>> @jint8.nnx.register(Mine)
      ... def mine(layer, quantize):
      ...     w = quantize("w", contract_axes=(0,))
      ...     return layer if w is None else jint8.nnx.Int8Einsum("td,dnh->tnh", w)
      >>> jint8.nnx.quantize(Mine())(jnp.ones((5, 4))).shape
      (5, 2, 3)
    """
    if not (isinstance(layer_type, type) and issubclass(layer_type, nnx.Module)):
        raise TypeError(f"Expected layer_type to be an nnx module class, got {layer_type!r}.")
    if converter is None:
        return lambda converter: register(layer_type, converter)
    if not callable(converter):
        raise TypeError(f"Expected converter to be callable, got {converter!r}.")
    _CONVERTERS[layer_type] = converter
    return converter


def find_converter(layer_type: type) -> Converter | None:
    """The converter of the class whose own `__call__` the layer runs."""
    for base in layer_type.__mro__:
        if base in _CONVERTERS:
            return _CONVERTERS[base] if layer_type.__call__ is base.__call__ else None
    return None


def _linear_arguments(layer: Any) -> dict[str, Any]:
    return {
        "bias": layer.bias,
        "use_bias": layer.bias is not None,
        "dtype": layer.dtype,
        "preferred_element_type": layer.preferred_element_type,
        "precision": layer.precision,
    }


@register(nnx.Linear)
def _linear(layer, quantize):
    shape = (layer.in_features, layer.out_features)
    kernel = quantize("kernel", (0,), shape)
    return layer if kernel is None else Int8Linear(*shape, kernel=kernel, **_linear_arguments(layer))


@register(nnx.LoRALinear)
def _lora_linear(layer, quantize):
    shape = (layer.in_features, layer.out_features)
    kernel = quantize("kernel", (0,), shape)
    if kernel is None:
        return layer
    return Int8LoRALinear(*shape, kernel=kernel, lora=layer.lora, **_linear_arguments(layer))


@register(nnx.LinearGeneral)
def _linear_general(layer, quantize):
    batch, contracted = len(layer.batch_axis), len(layer.in_features)
    shape = (*layer.batch_axis.values(), *layer.in_features, *layer.out_features)
    kernel = quantize("kernel", tuple(range(batch, batch + contracted)), shape, stacked=tuple(range(batch)))
    if kernel is None:
        return layer
    return Int8LinearGeneral(
        kernel,
        layer.bias,
        axis=layer.axis,
        batch_dims=tuple(layer.batch_axis),
        dtype=layer.dtype,
        preferred_element_type=layer.preferred_element_type,
        precision=layer.precision,
    )


@register(nnx.Einsum)
def _einsum(layer, quantize):
    if layer.einsum_str is None:
        return layer  # each call brings its own: nothing says which axes are contracted
    inputs, _, result = layer.einsum_str.replace(" ", "").partition("->")
    of_input, labels = inputs.split(",")
    contracted = tuple(i for i, label in enumerate(labels) if label not in result)
    batch = tuple(i for i, label in enumerate(labels) if label in of_input and label in result)
    kernel = quantize("kernel", contracted, tuple(layer.kernel_shape), stacked=batch)
    if kernel is None:
        return layer
    return Int8Einsum(
        layer.einsum_str,
        kernel,
        layer.bias,
        dtype=layer.dtype,
        preferred_element_type=layer.preferred_element_type,
        precision=layer.precision,
    )


@register(nnx.Embed)
def _embed(layer, quantize):
    embedding = quantize("embedding", (1,), (layer.num_embeddings, layer.features))
    return layer if embedding is None else Int8Embed(embedding, dtype=layer.dtype)
