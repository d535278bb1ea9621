"""Weights of four bits, calibrated and quantized layer after layer.

Each layer's activations are those that the layers before it have in four bits already, so that it makes up for a part
of their error. What is known of activations, second moments above all, which have k**2 values for each projection, is
dropped before the next layer's is found.

Source: Frantar et al., arXiv 2210.17323, section 4 (setup).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jint8._core.calibration import Calibration
from jint8._inference.programs import PROGRAMS
from jint8._trees.paths import leaf_paths
from jint8.analysis._calibrate import collector
from jint8.analysis._criteria import Criteria, choose
from jint8.models._attention import Context, context
from jint8.models._decoder import Block, Decoder

FIRST_PROJECTIONS = ("project_in/weight",)  # of those beside the layers, the ones that run before them

# From the path of a part of the parameters, "" for what belongs to no layer, and what is known of its activations, to
# these parameters: in floating point where nothing is known (None), else quantized.
ReadPart = Callable[[str, Calibration | None], dict[str, Any]]


class Activations(NamedTuple):
    """What goes into a layer, for one call."""

    x: jax.Array
    at: Context
    angles: Any  # of full layers, and of those with a window


def quantize_layer_by_layer(
    model: Decoder,
    read: ReadPart,
    quantized: Mapping[str, int],
    calls: Sequence[np.ndarray],
    criteria: Criteria,
) -> dict[str, Any]:
    """The parameters of a model, each layer quantized by the activations that meet it.

    Args:
      model: whose parameters they are.
      read: reads a part of them.
      quantized: paths of the weights that are quantized, `[*stack, n, k]`, and their dimensions.
      calls: tokens, int32 `[b, s]` each.
      criteria: of calibrated columns.
    """
    axes = {path: ((ndim - 1,), tuple(range(ndim - 2))) for path, ndim in quantized.items()}
    rest = read("", None)

    def find(run: Callable[..., Any], wanted: Sequence[str], tree: Any, batches: Sequence[Any]) -> Calibration:
        """What is known of the activations of some weights in `tree`; nothing where there are none."""
        if not wanted:
            return Calibration({}, {})
        found = collector(run, axes={path: axes[path] for path in wanted}, moments=True)(tree, batches)
        return choose(found.seen, criteria, found.moments)

    first = [path for path in quantized if path in FIRST_PROJECTIONS]
    last = [path for path in quantized if not path.startswith("layers_") and path not in FIRST_PROJECTIONS]
    known = find(functools.partial(_begin, model), first, rest, [(jnp.asarray(tokens),) for tokens in calls])
    states = [PROGRAMS.run(_begin, (model,), (rest, jnp.asarray(tokens))) for tokens in calls]
    layers, collectors = dict[str, Any](), dict[Any, Any]()
    for i in range(model.config.num_layers):
        name = f"layers_{i}"
        floats, block, local = read(name, None)[name], model.block(i), model.is_local(i)
        inputs = [(state.x, state.at, state.angles[local]) for state in states]
        wanted = tuple(path for path, _ in leaf_paths(floats) if f"{name}/{path}" in quantized)
        found = Calibration({}, {})
        if wanted:
            # Layers of one kind share the program that watches their activations.
            watched = {path: axes[f"{name}/{path}"] for path in wanted}
            if (block, wanted) not in collectors:
                collectors[block, wanted] = collector(functools.partial(_layer, block), axes=watched, moments=True)
            seen, moments = collectors[block, wanted](floats, inputs)
            found = _under(name, choose(seen, criteria, moments))
            del seen, moments
        del floats
        layers |= read(name, found)
        states = [
            Activations(PROGRAMS.run(_layer, (block,), (layers[name], *args)), *state[1:])
            for args, state in zip(inputs, states, strict=True)
        ]
    known |= find(functools.partial(_end, model), last, rest, [(state.x, state.at) for state in states])
    del rest, states
    return read("", known) | layers


def _begin(model: Decoder, params: Any, tokens: jax.Array) -> Activations:
    at = context(tokens)
    x, angles = model.apply({"params": params}, tokens, at, method="begin")
    return Activations(x, at, angles)


def _layer(block: Block, params: Any, x: jax.Array, at: Context, angles: Any) -> Any:
    return block.apply({"params": params}, x, at, angles, None)[0]


def _end(model: Decoder, params: Any, x: jax.Array, at: Context) -> Any:
    return model.apply({"params": params}, x, at, False, method="end")


def _under(name: str, known: Calibration) -> Calibration:
    """What is known of weights, by their paths in the whole tree."""
    by_path = ({f"{name}/{path}": value for path, value in of.items()} for of in (known, known.rms, known.moments))
    return Calibration(*by_path)
