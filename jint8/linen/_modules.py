"""Linen modules that always multiply in int8, for writing a model directly."""

from __future__ import annotations

import jax
from flax import linen as nn

from jint8._core.config import Config, check_config
from jint8.linen._handlers import dense, dense_general
from jint8.linen._registry import register


class Int8Dense(nn.Dense):
    """`nn.Dense` whose product is LLM.int8()'s.

    It declares the parameters of `nn.Dense`, so any checkpoint of one fits. A kernel in floating point is quantized at
    each call, and its gradient goes straight through (as if it weren't quantized); `jint8.quantize_params` turns it
    into a `QTensor` once and for all, with the same results.

    Attributes:
      config: how a kernel in floating point is quantized; a `QTensor` brings its own.

    Examples:
      >>> import jax, jax.numpy as jnp, jint8
      >>> layer, x = jint8.linen.Int8Dense(4), jnp.ones((2, 8))
      >>> params = layer.init(jax.random.key(0), x)
      >>> bool(jnp.array_equal(layer.apply(params, x), layer.apply(jint8.quantize_params(params), x)))
      True
    """

    config: Config = Config()

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """`inputs[..., k] @ kernel[k, features] + bias`."""
        check_config(self.config)
        if not self.has_variable("params", "kernel"):
            super().__call__(inputs)  # declares the parameters
        return dense(self, inputs)


class Int8DenseGeneral(nn.DenseGeneral):
    """`nn.DenseGeneral` whose product is LLM.int8()'s; see `Int8Dense`.

    `jint8.quantize_params` needs a plan for kernels that aren't two-dimensional.

    Attributes:
      config: how a kernel in floating point is quantized; a `QTensor` brings its own.

    Examples:
      >>> import jax, jax.numpy as jnp, jint8
      >>> layer, x = jint8.linen.Int8DenseGeneral((2, 4)), jnp.ones((2, 8))
      >>> params = layer.init(jax.random.key(0), x)
      >>> int8 = jint8.quantize_params(params, plan=jint8.plan(layer.apply, params, x))
      >>> layer.apply(int8, x).shape
      (2, 2, 4)
    """

    config: Config = Config()

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The product over `axis`, plus the bias."""
        check_config(self.config)
        if not self.has_variable("params", "kernel"):
            super().__call__(inputs)  # declares the parameters
        return dense_general(self, inputs)


# `jint8.apply` then knows them as layers that may hold int8 weights.
register(Int8Dense, dense)
register(Int8DenseGeneral, dense_general)
