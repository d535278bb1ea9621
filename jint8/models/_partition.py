"""Tensor parallelism for our decoders: which axis of each parameter is divided among devices."""

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

    The products into heads and hidden features are divided by output channels, those out of them by contracted
    features (Shoeybi et al., 2019, arXiv 1909.08053, section 3), the embedding and the output head by vocabulary.
    Norms and what is small stay whole; so does a vocabulary that the devices don't divide.

    The rows of a decoder's fused products are ordered so that a device has whole groups of heads, and of each factor of
    the feed-forward network the same features: between the two products of an attention or a feed-forward network
    nothing is exchanged, after them a sum. Where the devices don't divide the key-value heads (or, of the blocks that
    hidden features lie in, the largest power of two up to 16 in their number), results are the same, but XLA moves
    activations, and each device has the cache of all heads.

    Args:
      params: of a `Decoder`, float or quantized, also abstract.
      mesh: of devices.
      axis: of the mesh, over which the model is divided. None means `"model"`, or the mesh's only axis.

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
        stacked = (None,) * (len(leaf.shape) - 2)  # experts
        if name == "embedding" or layer == "lm_head":
            return PartitionSpec(axis) if leaf.shape[0] % mesh.shape[axis] == 0 else PartitionSpec()
        if layer in COLUMN_PARALLEL and name != "lora_a":
            return PartitionSpec(axis) if name == "bias" else PartitionSpec(*stacked, axis, None)
        if layer in ROW_PARALLEL and name == "weight":
            return PartitionSpec(*stacked, None, axis)
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, params, is_leaf=is_qtensor)


def model_axis(mesh: Mesh, axis: str | None = None) -> str:
    """The axis of the mesh over which a model is divided. Raises ValueError where there is none."""
    if axis is None:
        axis = "model" if "model" in mesh.shape or len(mesh.shape) != 1 else next(iter(mesh.shape))
    if axis not in mesh.shape:
        raise ValueError(f"Expected a mesh with an axis {axis!r}, got {tuple(mesh.shape)}.")
    return axis


def batch_axis(mesh: Mesh | None, batch: int) -> str | None:
    """The axis of the mesh over which a batch is divided: `"data"`, where there is one that divides it."""
    if mesh is None or "data" not in mesh.shape or model_axis(mesh) == "data" or batch % mesh.shape["data"]:
        return None
    return "data"


def heads_axis(mesh: Mesh, heads: int) -> str | None:
    """The axis of the mesh over which key-value heads are divided, as the weights are; None where that doesn't go."""
    return None if heads % mesh.shape[model_axis(mesh)] else model_axis(mesh)
