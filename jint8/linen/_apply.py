"""`jint8.apply`: any linen module on int8 parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from flax import linen as nn

from jint8._core.config import Config, check_config
from jint8._trees.params import with_config
from jint8.linen._registry import has_int8, int8_layers


def apply(apply_fn: Callable[..., Any], *, config: Config | None = None) -> Callable[..., Any]:
    """Makes a linen model run on a parameter tree with `QTensor`s, without changing it.

    `Dense`, `DenseGeneral`, `Einsum`, the projections of attention and `Embed` (both ways) multiply in int8 where their
    weight is a `QTensor`. So do all other layers with a `QTensor`: their own code runs, with its products in int8, as
    long as it only multiplies by the weight, rearranges it or looks rows up (`jint8.linen.register` is for others).
    Everything else runs as it is, and nothing but looked-up rows is dequantized. Under `jit`, `vmap`, `grad` (with
    respect to anything in floating point) and `jax.checkpoint`, and inside the module under `nn.scan`, `nn.remat`,
    `nn.vmap`, `nn.jit`. A layer's `precision` is that of what its product computes in floating point (see
    `jint8.dot_general`); a custom `dot_general` doesn't apply to int8 products.

    Args:
      apply_fn: `module.apply`, or any function that calls linen modules.
      config: None means the one stored in each weight; else it replaces those, so that a function that was jitted
        before with another one is traced again.

    Returns:
      A function with the arguments and results of `apply_fn`.

    Raises:
      TypeError: `apply_fn` isn't a function (a module itself isn't: give its `apply`), or `config` no `Config`. The
        returned function raises it for a layer that needs the float values of an int8 weight, naming the layer's
        path.

    Examples:
      >>> import jax, jax.numpy as jnp, jint8
      >>> from flax import linen as nn
      >>> model, x = nn.Dense(4), jnp.ones((2, 8))
      >>> params = jint8.quantize_params(model.init(jax.random.key(0), x))
      >>> jax.jit(jint8.apply(model.apply))(params, x).shape
      (2, 4)
    """
    if not callable(apply_fn) or isinstance(apply_fn, nn.Module):
        raise TypeError(f"Expected a function such as module.apply, got {type(apply_fn).__name__}.")

    if config is not None:
        check_config(config)

    def int8_apply(*args, **kwargs):
        if config is not None:
            args = tuple(_replace_config(value, config) for value in args)
            kwargs = {name: _replace_config(value, config) for name, value in kwargs.items()}
        with int8_layers():
            return apply_fn(*args, **kwargs)

    return functools.update_wrapper(int8_apply, apply_fn, updated=())


def _replace_config(value: Any, config: Config) -> Any:
    return with_config(value, config) if has_int8(value) else value
