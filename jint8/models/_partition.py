"""Tensor parallelism for the decoder: which axis of each parameter is sharded over a mesh."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from jint8._core.qtensor import is_qtensor
from jint8._trees.paths import path_string

COLUMN_PARALLEL = ("qkv", "gate_up", "up", "lm_head")
ROW_PARALLEL = ("out", "down")


def partition_specs(params: Any, mesh: Mesh, axis: str | None = None) -> Any:
    """`PartitionSpec`s of a decoder's parameters, for `jint8.shardings`.

    The projections into heads and hidden features are sharded by output channels, those out of them by contracted
    features (Shoeybi et al., 2019, arXiv 1909.08053, section 3), the embedding and the output head by vocabulary.
    Norms and other small parameters are replicated; so is a vocabulary that the number of devices doesn't divide.

    The rows of a decoder's fused projections are ordered so that a device has whole groups of heads, and the same
    features of both factors of the feed-forward network: the only communication is one sum over devices after each
    attention and each feed-forward network. Where the number of devices doesn't divide the key-value heads, or
    `gcd(intermediate_size, 16)`, results are the same, but XLA reshards activations, and with such heads each device
    has the cache of all of them.

    Args:
      params: of a `Decoder`, float or quantized, also abstract.
      mesh: of devices.
      axis: of the mesh, over which the model is sharded. None means `"model"`, or the mesh's only axis.

    Returns:
      A tree of `params`' structure, with a spec for each `QTensor`.

    Raises:
      ValueError: no such axis.

    Examples:
      >>> import jax, jax.numpy as jnp, jint8
      >>> from jint8.models import partition_specs
      >>> params = {"layers_0": {"mlp": {"down": {"weight": jnp.ones((8, 16))}}}}
      >>> tuple(partition_specs(params, jax.make_mesh((1,), ("model",)))["layers_0"]["mlp"]["down"]["weight"])
      (None, 'model')
    """
    axis = model_axis(mesh, axis)

    def spec(path, leaf):
        *_, layer, name = "", *path_string(path).split("/")
        stacked = (None,) * (len(leaf.shape) - 2)  # the axis of experts, which every device has all of
        if name == "embedding" or layer == "lm_head":
            return PartitionSpec(axis) if leaf.shape[0] % mesh.shape[axis] == 0 else PartitionSpec()
        if layer in COLUMN_PARALLEL and name != "lora_a":
            return PartitionSpec(axis) if name == "bias" else PartitionSpec(*stacked, axis, None)
        if layer in ROW_PARALLEL and name == "weight":
            return PartitionSpec(*stacked, None, axis)
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, params, is_leaf=is_qtensor)


def model_axis(mesh: Mesh, axis: str | None = None) -> str:
    """The axis of the mesh over which a model is sharded. Raises ValueError where there is none."""
    if axis is None:
        axis = "model" if "model" in mesh.shape or len(mesh.shape) != 1 else next(iter(mesh.shape))
    if axis not in mesh.shape:
        raise ValueError(f"Expected a mesh with an axis {axis!r}, got {tuple(mesh.shape)}.")
    return axis


def batch_axis(mesh: Mesh | None, batch: int) -> str | None:
    """The axis of the mesh over which a batch is sharded: `"data"`. None where the mesh has none that divides it."""
    if mesh is None or "data" not in mesh.shape or model_axis(mesh) == "data" or batch % mesh.shape["data"]:
        return None
    return "data"


def heads_axis(mesh: Mesh, heads: int) -> str | None:
    """The axis of the mesh over which key-value heads are sharded, as weights are; None if it doesn't divide them."""
    return None if heads % mesh.shape[model_axis(mesh)] else model_axis(mesh)
