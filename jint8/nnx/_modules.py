"""nnx layers with int8 weights."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jint8._core.config import Config
from jint8._core.qtensor import QTensor, contract_last, is_qtensor
from jint8._core.quantize import quantize as quantize_array
from jint8._ops import layers as _layers


class Quantized(nnx.Variable):
    """A Variable that holds a `QTensor`. Not an `nnx.Param`: optimizers and `nnx.grad` leave it alone.

    Args:
      value: the `QTensor`; `get_value()` gives it back.

    Examples:
      >>> import jax.numpy as jnp, jint8
      >>> from flax import nnx
      >>> model = jint8.nnx.quantize(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
      >>> nnx.state(model, jint8.nnx.Quantized)["kernel"].get_value().shape
      (8, 4)
    """


def _variable(weight: Any) -> Quantized:
    variable = weight if isinstance(weight, Quantized) else Quantized(weight)
    if not is_qtensor(variable.get_value()):
        raise TypeError(f"Expected the weight to be a QTensor, got {type(weight).__name__}; see jint8.quantize.")
    return variable


def _bias(bias: Any) -> Any:
    if bias is None:
        return nnx.data(None)
    return bias if isinstance(bias, nnx.Variable) else nnx.Param(bias)


def _value(variable: nnx.Variable | None) -> Any:
    return None if variable is None else variable.get_value()


def _sharded(y: jax.Array, out_sharding: Any) -> jax.Array:
    """`y`, divided as the caller of a layer asks for, on a mesh whose axes are explicit."""
    return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)


class Int8LinearGeneral(nnx.Module):
    """`nnx.LinearGeneral` with an int8 kernel.

    Args:
      kernel: a `QTensor` `[*batch, *contracted, *features]`, quantized over the contracted axes.
      bias: None, an array `[*batch, *features]` or a Variable with one.
      axis: the axes of the input that are contracted.
      batch_dims: the axes of the input that are batch axes of the kernel.
      dtype: of the computation; None: what input and parameters promote to.
      preferred_element_type: dtype of the result, where it isn't that of the computation.
      precision: as in `jint8.dot_general`: of what is computed in floating point.

    Examples:
      >>> import jax.numpy as jnp, jint8
      >>> layer = jint8.nnx.Int8LinearGeneral(jint8.quantize(jnp.ones((8, 2, 4))))
      >>> layer(jnp.ones((3, 8))).shape
      (3, 2, 4)
    """

    def __init__(
        self,
        kernel: QTensor | Quantized,
        bias: Any = None,
        *,
        axis: Sequence[int] = (-1,),
        batch_dims: Sequence[int] = (),
        dtype: DTypeLike | None = None,
        preferred_element_type: Any = None,
        precision: Any = None,
    ):
        self.kernel = _variable(kernel)
        self.bias = _bias(bias)
        self.axis = tuple(axis)
        self.batch_dims = tuple(batch_dims)
        self.dtype = dtype
        self.preferred_element_type = preferred_element_type
        self.precision = precision

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """The LLM.int8() product over `axis`, plus the bias; `out_sharding` is that of the result, as in Flax."""
        y = _layers.dense_general(
            inputs,
            _value(self.kernel),
            _value(self.bias),
            axis=self.axis,
            batch_dims=self.batch_dims,
            dtype=self.dtype,
            out_dtype=self.preferred_element_type,
            precision=self.precision,
        )
        return _sharded(y, out_sharding)


class Int8Linear(Int8LinearGeneral):
    """`nnx.Linear` with an int8 kernel: `y = x @ kernel + bias`.

    Args:
      in_features: size of the last axis of the input.
      out_features: size of the last axis of the result.
      kernel: a `QTensor` or a float array `[in_features, out_features]` to start from, quantized here. None: random.
      bias: an array `[out_features]` or a Variable with one; None: zeros.
      use_bias: False for none.
      dtype: of the computation; None: what input and parameters promote to.
      param_dtype: of random kernels, and of biases of zeros.
      preferred_element_type: dtype of the result, where it isn't that of the computation.
      precision: as in `jint8.dot_general`: of what is computed in floating point.
      kernel_init: how random kernels are made; default: `lecun_normal`.
      config: how to quantize `kernel`, if it isn't a `QTensor`.
      rngs: needed for a random kernel only.

    Raises:
      ValueError: a kernel of another shape, or neither kernel nor rngs.

    Examples:
      >>> import jax.numpy as jnp, jint8
      >>> layer = jint8.nnx.Int8Linear(8, 4, kernel=jnp.ones((8, 4)))
      >>> layer(jnp.ones((3, 8))).shape, layer.kernel.get_value().q.dtype
      ((3, 4), dtype('int8'))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kernel: Any = None,
        bias: Any = None,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        preferred_element_type: Any = None,
        precision: Any = None,
        kernel_init: Any = None,
        config: Config = Config(),
        rngs: nnx.Rngs | None = None,
    ):
        if kernel is None:
            if rngs is None:
                raise ValueError("Expected a kernel, or rngs to make one, got neither.")
            kernel_init = kernel_init or nnx.initializers.lecun_normal()
            kernel = kernel_init(rngs.params(), (in_features, out_features), param_dtype)
        value = _value(kernel) if isinstance(kernel, nnx.Variable) else kernel
        if not is_qtensor(value):
            value = kernel = contract_last(quantize_array(value, contract_axes=(0,), config=config), (0,))
        if value.shape[-2:] != (in_features, out_features) and value.ndim == 2:
            raise ValueError(f"Expected a kernel of shape {(in_features, out_features)}, got {value.shape}.")
        if bias is None and use_bias:
            bias = jnp.zeros(out_features, param_dtype)
        super().__init__(
            kernel,
            bias if use_bias else None,
            dtype=dtype,
            preferred_element_type=preferred_element_type,
            precision=precision,
        )
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = use_bias


class Int8LoRALinear(Int8Linear):
    """`nnx.LoRALinear` with an int8 kernel: `y = x @ kernel + bias + lora(x)`; the LoRA parameters stay trainable.

    Args:
      *args: as for `Int8Linear`.
      lora: the `nnx.LoRA` layer.
      **kwargs: as for `Int8Linear`.

    Examples:
      >>> import jax.numpy as jnp, jint8
      >>> from flax import nnx
      >>> lora = nnx.LoRA(8, 2, 4, rngs=nnx.Rngs(0))
      >>> jint8.nnx.Int8LoRALinear(8, 4, kernel=jnp.ones((8, 4)), lora=lora)(jnp.ones((3, 8))).shape
      (3, 4)
    """

    def __init__(self, *args, lora: nnx.Module, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora = lora

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """The int8 product plus the low-rank one."""
        return super().__call__(inputs, out_sharding) + self.lora(inputs)


class Int8Einsum(nnx.Module):
    """`nnx.Einsum` with an int8 kernel.

    Args:
      einsum_str: such as `"btd,dnh->btnh"`, the kernel second; None where each call gives it.
      kernel: a `QTensor`, quantized over the contracted axes.
      bias: None, or an array (or a Variable with one) over those axes of the result that come from the kernel.
      dtype: of the computation; None: what input and parameters promote to.
      preferred_element_type: dtype of the result, where it isn't that of the computation.
      precision: as in `jint8.dot_general`: of what is computed in floating point.

    Examples:
      >>> import jax.numpy as jnp, jint8
      >>> layer = jint8.nnx.Int8Einsum("btd,dnh->btnh", jint8.quantize(jnp.ones((8, 2, 4))))
      >>> layer(jnp.ones((1, 3, 8))).shape
      (1, 3, 2, 4)
    """

    def __init__(
        self,
        einsum_str: str | None,
        kernel: QTensor | Quantized,
        bias: Any = None,
        *,
        dtype: DTypeLike | None = None,
        preferred_element_type: Any = None,
        precision: Any = None,
    ):
        self.einsum_str = einsum_str
        self.kernel = _variable(kernel)
        self.bias = _bias(bias)
        self.dtype = dtype
        self.preferred_element_type = preferred_element_type
        self.precision = precision

    def __call__(self, inputs: jax.Array, einsum_str: str | None = None, out_sharding: Any = None) -> jax.Array:
        """The LLM.int8() product that the subscripts name, plus the bias."""
        subscripts = einsum_str or self.einsum_str
        if subscripts is None:
            raise ValueError("Expected einsum_str in the constructor or in the call, got neither.")
        y = _layers.einsum(
            subscripts,
            inputs,
            _value(self.kernel),
            _value(self.bias),
            dtype=self.dtype,
            out_dtype=self.preferred_element_type,
            precision=self.precision,
        )
        return _sharded(y, out_sharding)


class Int8Embed(nnx.Module):
    """`nnx.Embed` with an int8 embedding, for the lookup and as an output head.

    Args:
      embedding: a `QTensor` `[vocabulary, features]`, quantized over its last axis.
      dtype: of the result.

    Examples:
      >>> import jax.numpy as jnp, jint8
      >>> layer = jint8.nnx.Int8Embed(jint8.quantize(jnp.ones((10, 4)), contract_axes=(1,)))
      >>> layer.attend(layer(jnp.array([3, 1]))).shape
      (2, 10)
    """

    def __init__(self, embedding: QTensor | Quantized, *, dtype: DTypeLike | None = None):
        self.embedding = _variable(embedding)
        self.dtype = dtype

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Rows of the embedding."""
        rows = functools.partial(_layers.lookup, dtype=self.dtype)
        if out_sharding is not None:  # explicit axes can't tell how rows of a divided table are: XLA decides within
            rows = jax.sharding.auto_axes(rows, out_sharding=out_sharding)
        return rows(_value(self.embedding), inputs)

    def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
        """The LLM.int8() product with every row of the embedding."""
        return _sharded(_layers.attend(query, _value(self.embedding), dtype=self.dtype), out_sharding)
