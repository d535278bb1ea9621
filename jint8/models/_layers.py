"""Layers of the decoder. Weights are `[n, k]`; one that is a `QTensor` is multiplied in int8, a float one in floats."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jint8._core.qtensor import is_qtensor
from jint8._ops.matmul import matmul, sharded_matmul
from jint8._ops.ragged_dot import ragged_dot
from jint8.models._config import Activation, ModelConfig
from jint8.models._partition import model_axis

ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class Linear(nn.Module):
    """`x @ weight.T + bias`, in int8 where the weight is a `QTensor`.

    Where a LoRA adapter has added `lora_a` and `lora_b` to the layer's parameters, plus `x @ lora_a.T @ lora_b.T`.

    Attributes:
      features: n.
      use_bias: whether there is a bias.
      dtype: of freshly made parameters.
      mesh: devices that the weight is sharded over; see `partition_specs`.
      row_parallel: sharded by the contracted features k, not by the output channels n.
    """

    features: int
    use_bias: bool = False
    dtype: DTypeLike = jnp.float32
    mesh: Mesh | None = None
    row_parallel: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`x[..., k]` -> `[..., features]`."""
        init = nn.initializers.lecun_normal(in_axis=1, out_axis=0)
        weight = weight_of(self, "weight", init, (self.features, x.shape[-1]))
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.dtype) if self.use_bias else None
        if is_qtensor(weight) and self.mesh is not None and self.row_parallel:
            y = sharded_matmul(x, weight, bias=bias, mesh=self.mesh, axis=model_axis(self.mesh))
        elif is_qtensor(weight):
            y = matmul(x, weight, bias=bias, implementation=implementation(self.mesh))
        else:
            y = project(x, weight)
            y = y if bias is None else y + bias.astype(y.dtype)
        if self.has_variable("params", "lora_a"):
            y = y + project(project(x, self.get_variable("params", "lora_a")), self.get_variable("params", "lora_b"))
        return y


def weight_of(module: Any, name: str, init: Any, shape: tuple[int, ...]) -> Any:
    """`module.param(name, init, shape, module.dtype)`, which may be a `QTensor` that stands for an array of this shape.

    `param` compares the shape with that of the first array, of which one in four bits has two features in a byte.
    """
    if module.has_variable("params", name):
        value = module.get_variable("params", name)
        if is_qtensor(value) and value.shape == shape:
            return value
    return module.param(name, init, shape, module.dtype)


def implementation(mesh: Mesh | None) -> Literal["xla"] | None:
    """The `implementation` of products on a mesh: XLA's.

    The GPU kernels run on one device: XLA can't partition them, and would gather the whole weight on each device.
    """
    return None if mesh is None else "xla"


def project(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Float `x[..., k] @ weight[n, k].T`, in `x.dtype`."""
    weight = weight.astype(x.dtype)
    if x.size == x.shape[-1]:
        # One row: as matrix times vector, because XLA's CPU backend is up to 20 times slower with the row on the left.
        return jnp.matmul(weight, x.reshape(-1)).reshape(*x.shape[:-1], -1)
    return lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))


class GroupedLinear(nn.Module):
    """Rows sorted by expert, each times its expert's weight.

    Attributes:
      experts: how many there are.
      features: n.
      dtype: of freshly made parameters.
    """

    experts: int
    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """`x[m, k]`, of which expert e has `group_sizes[e]` rows -> `[m, features]`."""
        init = nn.initializers.lecun_normal(in_axis=2, out_axis=1, batch_axis=0)
        weight = weight_of(self, "weight", init, (self.experts, self.features, x.shape[-1]))
        if is_qtensor(weight):  # ragged_dot takes [e, k, n]: the same values with another declared order of axes
            return ragged_dot(x, dataclasses.replace(weight, order=(1, 0), stack=(0,)), group_sizes)
        return lax.ragged_dot(x, weight.astype(x.dtype).swapaxes(1, 2), group_sizes)


class Norm(nn.Module):
    """RMS or layer norm, in float32, rounded to `x.dtype`.

    Formula: `y = x / sqrt(mean(x**2) + eps) * (offset + scale)`; a layer norm subtracts `mean(x)` before, and adds
    `bias` after.
    """

    config: ModelConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`x[..., d]` -> the same shape and dtype."""
        c = self.config
        scale = self.param("scale", nn.initializers.constant(1 - c.norm_offset), (x.shape[-1],), self.dtype)
        x32 = x.astype(jnp.float32)
        if c.norm == "layer":
            x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        x32 = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + c.norm_eps)
        x32 = x32 * (scale.astype(jnp.float32) + c.norm_offset)
        if c.norm == "layer" and c.norm_bias:
            x32 = x32 + self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.dtype)
        return x32.astype(x.dtype)


def softcap(x: jax.Array, cap: float) -> jax.Array:
    """`cap * tanh(x / cap)`; `x` where there is no cap."""
    return cap * jnp.tanh(x / cap) if cap else x
