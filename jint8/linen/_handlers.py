"""The standard layers of linen."""

from __future__ import annotations

from typing import Any

from flax import linen as nn

from jint8._core.qtensor import is_qtensor
from jint8._ops import layers as _layers
from jint8.linen._registry import float_config, has_int8, own_params, param, register


def _axes(axes: Any) -> tuple[int, ...]:
    return tuple(axes) if isinstance(axes, (tuple, list)) else (axes,)


def _kernel(module: nn.Module) -> Any:
    """The kernel if it is to be multiplied in int8; else None."""
    kernel = param(module, "kernel")
    return kernel if is_qtensor(kernel) or float_config(module) is not None else None


@register(nn.Dense)
def dense(module, inputs):
    """`nn.Dense`."""
    if (kernel := _kernel(module)) is None:
        return NotImplemented
    bias = param(module, "bias") if module.use_bias else None
    return _layers.dense_general(
        inputs, kernel, bias, dtype=module.dtype, config=float_config(module), precision=module.precision
    )


@register(nn.DenseGeneral)
def dense_general(module, inputs):
    """`nn.DenseGeneral`, and with it the projections of attention."""
    if (kernel := _kernel(module)) is None:
        return NotImplemented
    return _layers.dense_general(
        inputs,
        kernel,
        param(module, "bias") if module.use_bias else None,
        axis=_axes(module.axis),
        batch_dims=_axes(module.batch_dims),
        dtype=module.dtype,
        config=float_config(module),
        precision=module.precision,
    )


@register(nn.Einsum)
def einsum(module, inputs, einsum_str=None):
    """`nn.Einsum`."""
    if (kernel := _kernel(module)) is None:
        return NotImplemented
    return _layers.einsum(
        nn.merge_param("einsum_str", module.einsum_str, einsum_str),
        inputs,
        kernel,
        param(module, "bias") if module.use_bias else None,
        dtype=module.dtype,
        out_dtype=module.preferred_element_type,
        config=float_config(module),
        precision=module.precision,
    )


@register(nn.Embed)
def lookup(module, inputs):
    """`nn.Embed`: rows of an int8 embedding."""
    embedding = param(module, "embedding")
    return _layers.lookup(embedding, inputs, dtype=module.dtype) if is_qtensor(embedding) else NotImplemented


@register(nn.Embed, method="attend")
def attend(module, query):
    """`nn.Embed.attend`: the tied output head."""
    embedding = param(module, "embedding")
    return _layers.attend(query, embedding, dtype=module.dtype) if is_qtensor(embedding) else NotImplemented


@register(nn.WeightNorm)
@register(nn.SpectralNorm)
def normalized(module, *args, **kwargs):
    """Layers that change a kernel before each product: they need it in floating point."""
    if has_int8(own_params(module)):
        raise NotImplementedError(
            f"Expected floating-point weights below {type(module).__name__}, which rescales them at each call, got "
            "int8: leave them out with skip= in jint8.quantize_params."
        )
    return NotImplemented
