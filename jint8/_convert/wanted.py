"""What is known of each parameter before a checkpoint is read: its tensors, its shape, whether it becomes int8."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jint8._convert import bitsandbytes as bitsandbytes
from jint8._core.config import Config
from jint8._core.quantize import quantize as quantize_weight
from jint8._trees.params import OUTPUT_HEADS, standard_axes
from jint8._trees.paths import Selection, leaf_paths, nested
from jint8.checkpoints import Checkpoint
from jint8.models import Decoder, Encoder, ModelConfig
from jint8.models.families import Source, ignored, sources

# Weights that stay in floating point unless `include` names them. A router is small, and a wrong choice is costly.
SKIPPED = (*OUTPUT_HEADS, "router")


def planned_params(
    checkpoint: Checkpoint, model: Decoder | Encoder, *, config: Config, selection: Selection
) -> dict[str, Any]:
    """What `read_params` would return, by path and without values: `jax.ShapeDtypeStruct`s, and `QTensor`s of them."""
    return planned(wanted_params(checkpoint, model, config, selection), config)


def planned(wanted: Mapping[str, Wanted], config: Config) -> dict[str, Any]:
    planned: dict[str, Any] = {}
    for path, (_, expected, axes) in wanted.items():
        planned[path] = expected if axes is None else quantized_shape(expected, axes, config)
    return planned


def planned_tree(model: Decoder | Encoder, *, config: Config) -> dict[str, Any]:
    """The parameters of a checkpoint of `model`, as a tree and without values, as `planned_params` has them by path."""
    expected = abstract_params(model)
    planned: dict[str, Any] = {}
    for path, source in sources(model.config, expected, ()).items():
        leaf: Any = expected[path]
        axes = None
        if config.quantizes_weights:
            axes = quantized_axes(path, source, len(leaf.shape), Selection())
        planned[path] = leaf if axes is None else quantized_shape(leaf, axes, config)
    return nested(planned)


def quantized_shape(leaf: jax.ShapeDtypeStruct, axes: tuple[int, ...], config: Config) -> Any:
    return jax.eval_shape(functools.partial(quantize_weight, contract_axes=axes, config=config), leaf)


def abstract_params(model: Decoder | Encoder) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a model's float parameters, by path.

    Layers differ in no shape, so that one is traced for all: tracing 80 takes seconds.
    """
    one = model.clone(config=dataclasses.replace(model.config, num_layers=1))
    tree = jax.eval_shape(one.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32))
    shapes: dict[str, jax.ShapeDtypeStruct] = {}
    for path, leaf in leaf_paths(tree):
        layers = range(model.config.num_layers) if path.startswith("layers_0/") else range(1)
        shapes |= {path.replace("layers_0/", f"layers_{i}/", 1): leaf for i in layers}
    return shapes


class Wanted(NamedTuple):
    """What is known of a parameter before it is read."""

    source: Source
    expected: jax.ShapeDtypeStruct
    axes: tuple[int, ...] | None  # contracted axes of a weight that is int8 in the end, None for one in floating point


def wanted_params(
    checkpoint: Checkpoint, model: Decoder | Encoder, config: Config, selection: Selection
) -> dict[str, Wanted]:
    """Every parameter, in the order of the files. Raises where the checkpoint's tensors differ."""
    expected = abstract_params(model)
    found = sources(model.config, expected, checkpoint.tensors.keys())
    _check_names(checkpoint, found, model.config)
    for path, source in found.items():
        _check_shapes(checkpoint, source, expected[path].shape)
    place = {name: i for i, name in enumerate(checkpoint.tensors)}
    in_order = sorted(found, key=lambda path: place[found[path].tensors[0]])
    is_int8 = bitsandbytes.is_int8(checkpoint)

    def axes(path: str) -> tuple[int, ...] | None:
        if not config.quantizes_weights:
            return None
        if is_int8:
            int8 = all(bitsandbytes.is_int8_weight(checkpoint, name) for name in found[path].tensors)
            return standard_axes(path, len(expected[path].shape))[0] if int8 else None
        return quantized_axes(path, found[path], len(expected[path].shape), selection)

    return {path: Wanted(found[path], expected[path], axes(path)) for path in in_order}


def quantized_axes(path: str, source: Source, ndim: int, selection: Selection) -> tuple[int, ...] | None:
    """`Wanted.axes` of a parameter of a checkpoint in floating point."""
    axes, _ = standard_axes(path, ndim)
    if axes is None and path != "embedding":
        return None
    known_as = (path, *(name.replace(".", "/") for name in source.tensors))
    if path == "embedding":
        return (1,) if selection.includes(*known_as) else None
    return None if selection.skips(*known_as, default=SKIPPED) else axes


def _check_names(checkpoint: Checkpoint, found: dict[str, Source], config: ModelConfig) -> None:
    wanted = {name for source in found.values() for name in source.tensors}
    for name in sorted(wanted - set(checkpoint.tensors)):
        raise ValueError(f"{checkpoint.path}: Expected a tensor {name!r}, got none of that name.")
    wanted |= {beside for name in wanted for beside in bitsandbytes.companions(checkpoint, name)}
    for name in sorted(set(checkpoint.tensors) - wanted):
        if not ignored(name, config):
            file = checkpoint.tensors[name].file
            raise ValueError(f"{file}: tensor {name!r}: Expected only tensors of a {config.family} model, got this.")


def _check_shapes(checkpoint: Checkpoint, source: Source, shape: tuple[int, ...]) -> None:
    infos = [checkpoint.tensors[name] for name in source.tensors]
    rows, width = math.prod(shape[: max(1, len(shape) - 1)]), shape[-1:] if len(shape) > 1 else ()
    got = []
    for info in infos:
        int8 = bitsandbytes.is_int8_weight(checkpoint, info.name)
        transposed = source.transposed and not int8
        stored = info.shape[::-1] if transposed else info.shape
        if stored[1:] != width or not stored:
            expected = ["n", *map(str, width)][:: -1 if transposed else 1]
            raise ValueError(
                f"{info.file}: tensor {info.name!r}: Expected shape ({', '.join(expected)}), got {info.shape}."
            )
        got.append(stored[0])
    if sum(got) != rows:
        each = " and ".join(f"{n} in {info.name!r}" for n, info in zip(got, infos, strict=True))
        raise ValueError(f"{infos[0].file}: Expected {rows} rows, got {each}.")
