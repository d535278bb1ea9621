"""What each parameter is made of and becomes, before anything is read: its tensors, its shape, whether it is int8."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jint8._convert import four_bit_codes as four_bit_codes
from jint8._convert import int8_weights as int8_weights
from jint8._convert.assemble import decoder_shardings
from jint8._convert.settings import kept_in_float
from jint8._core.config import Config
from jint8._core.qtensor import QTensor, contracted_axes, is_qtensor
from jint8._core.quantize import quantize
from jint8._core.rotation import rotation_block
from jint8._trees.left_out import say_left_out
from jint8._trees.params import OUTPUT_HEADS, standard_axes
from jint8._trees.paths import Selection, leaf_paths, matches, nested
from jint8.checkpoints import Checkpoint
from jint8.models import Decoder, Encoder, ModelConfig
from jint8.models.families import Source, ignored, sources

# Weights that stay in floating point unless `include` names them. A router is small, and when rounding has it choose
# another expert, all of the token's output changes.
FLOAT_BY_DEFAULT = (*OUTPUT_HEADS, "router")


class Target(NamedTuple):
    """A parameter of the model that a checkpoint is read into.

    Attributes:
      source: the checkpoint's tensors that it is made of.
      float_leaf: its shape and dtype in floating point.
      contract_axes: the contracted axes of a weight that becomes a `QTensor`; None where it stays in floating point.
      group: None, or the size of the groups of four-bit codes that the checkpoint has and the parameter keeps.
    """

    source: Source
    float_leaf: jax.ShapeDtypeStruct
    contract_axes: tuple[int, ...] | None
    group: int | None = None

    def config(self, config: Config) -> Config:
        """What the parameter is quantized by: `config`, but for the groups that the checkpoint has."""
        return config if self.group is None else dataclasses.replace(config, group=self.group, grouping="oc")

    def abstract(self, config: Config) -> jax.ShapeDtypeStruct | QTensor:
        """The parameter that is read, without values."""
        if self.contract_axes is None:
            return self.float_leaf
        config = self.config(config)
        if config.four_bits:
            # What AdaDim chooses has about as many bytes; how codes are rounded makes no difference.
            grouping = "oc" if config.grouping == "ada" else config.grouping
            config = dataclasses.replace(config, grouping=grouping, rounding="nearest")
        return jax.eval_shape(
            functools.partial(quantize, contract_axes=self.contract_axes, config=config), self.float_leaf
        )


def check_sizes(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Holds a model's sizes against the tensors, before anything is made that is as large as a size.

    Raises:
      ValueError: more layers than tensors, or a size above the number of values of the largest tensor: the
        configuration is damaged, or another model's.
    """
    count, largest = len(checkpoint.tensors), max((info.size for info in checkpoint.tensors.values()), default=0)
    if config.num_layers > count:
        raise ValueError(f"Expected at most {count} layers, the number of tensors, got {config.num_layers}.")
    sizes = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads times head_dim": max(config.num_heads, config.num_kv_heads) * config.head_dim,
        "learned positions": 0 if config.learned_positions is None else config.max_positions,
    }
    for name, size in sizes.items():
        if size > largest:
            raise ValueError(f"Expected {name} to be at most {largest}, the size of the largest tensor, got {size}.")


def find_targets(
    checkpoint: Checkpoint, model: Decoder | Encoder, *, config: Config, selection: Selection
) -> dict[str, Target]:
    """Every parameter's `Target` by path, in the order in which the checkpoint's files have their tensors.

    Raises:
      ValueError: a tensor is missing, unknown or of a wrong shape; the message names it.
    """
    float_leaves = abstract_float_params(model)
    found = sources(model.config, float_leaves, checkpoint.tensors.keys())
    _check_names(checkpoint, found, model.config)
    for path, source in found.items():
        _check_shapes(checkpoint, source, float_leaves[path].shape)
    position = {name: i for i, name in enumerate(checkpoint.tensors)}
    in_order = sorted(found, key=lambda path: position[found[path].tensors[0]])
    is_int8 = int8_weights.is_int8(checkpoint)

    def contract_axes(path: str) -> tuple[int, ...] | None:
        ndim = len(float_leaves[path].shape)
        if not is_int8:
            return _axes_to_quantize(path, found[path], ndim, config, selection)
        all_int8 = all(int8_weights.is_int8_weight(checkpoint, name) for name in found[path].tensors)
        return standard_axes(path, ndim, included=True)[0] if config.quantizes_weights and all_int8 else None

    def target(path: str) -> Target:
        axes = contract_axes(path)
        group = None if axes is None else four_bit_codes.kept_group(checkpoint, found[path].tensors, config)
        return Target(found[path], float_leaves[path], axes, group)

    return {path: target(path) for path in in_order}


def abstract_leaves(
    targets: Mapping[str, Target], config: Config, mesh: Mesh | None = None
) -> dict[str, jax.ShapeDtypeStruct | QTensor]:
    """What `read_params` returns for these targets, by path and without values."""
    if mesh is None:
        return {path: target.abstract(config) for path, target in targets.items()}
    # How many features are rotated together is for the shards to decide, once they are known.
    any_block = dataclasses.replace(config, rotate=min(config.rotate, 1))
    leaves = {path: target.abstract(any_block) for path, target in targets.items()}

    def in_blocks(leaf: Any, placed: Any) -> Any:
        if not is_qtensor(leaf):
            return leaf
        q = jax.ShapeDtypeStruct(leaf.q.shape, leaf.q.dtype, sharding=placed.q)
        block = rotation_block(q, contracted_axes(leaf), config.rotate)
        return dataclasses.replace(leaf, config=dataclasses.replace(leaf.config, rotate=block))

    placed = decoder_shardings(leaves, mesh)
    return {path: in_blocks(leaf, placed[path]) for path, leaf in leaves.items()}


def abstract_quantized_params(model: Decoder | Encoder, config: Config, mesh: Mesh | None = None) -> dict[str, Any]:
    """The parameters that a checkpoint of `model` in floating point is read into by default, without values."""
    float_leaves = abstract_float_params(model)
    targets = {}
    for path, source in sources(model.config, float_leaves, ()).items():
        leaf = float_leaves[path]
        targets[path] = Target(source, leaf, _axes_to_quantize(path, source, len(leaf.shape), config, Selection()))
    return nested(abstract_leaves(targets, config, mesh))


def abstract_float_params(model: Decoder | Encoder) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a model's float parameters, by path.

    All layers have the same shapes, so that one is traced for all: tracing 80 takes seconds.
    """
    one = model.clone(config=dataclasses.replace(model.config, num_layers=1))
    tree = jax.eval_shape(one.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32))
    shapes: dict[str, jax.ShapeDtypeStruct] = {}
    for path, leaf in leaf_paths(tree):
        layers = range(model.config.num_layers) if path.startswith("layers_0/") else range(1)
        shapes |= {path.replace("layers_0/", f"layers_{i}/", 1): leaf for i in layers}
    return shapes


def _axes_to_quantize(
    path: str, source: Source, ndim: int, config: Config, selection: Selection
) -> tuple[int, ...] | None:
    """`Target.contract_axes` of a parameter whose tensors are in floating point.

    A selection is matched against our path and the checkpoint's names. Of a fused projection (q, k and v; gate and up)
    one name is enough: there is one product for all.
    """
    axes, _ = standard_axes(path, ndim)
    if not config.quantizes_weights or (axes is None and path != "embedding"):
        return None
    known_as = _known_as(path, source)
    if path == "embedding":
        return (1,) if selection.includes(*known_as) else None
    return None if selection.skips(*known_as, default=FLOAT_BY_DEFAULT) else axes


def needs_calibration(checkpoint: Checkpoint, model: Decoder | Encoder, config: Config, selection: Selection) -> bool:
    """Whether anything is decided by what is known of activations: not where all weights keep the file's own codes."""
    if not config.is_calibrated or config.uses_calibrated_columns or not four_bit_codes.keeps_codes(config):
        return config.is_calibrated
    targets = find_targets(checkpoint, model, config=config, selection=selection)
    return any(target.contract_axes is not None and target.group is None for target in targets.values())


def say_what_differs(checkpoint: Checkpoint, targets: Mapping[str, Target], config: Config) -> None:
    """Warns of projections that a checkpoint keeps in floating point, and of codes of its own that aren't kept."""
    if config.quantizes_weights:
        _say_left_out(checkpoint, targets)
        four_bit_codes.say_rounded(checkpoint, targets, config)


def _say_left_out(checkpoint: Checkpoint, targets: Mapping[str, Target]) -> None:
    """Warns of projections in floating point; heads and routers are so by default."""
    unwanted = kept_in_float(checkpoint.config)
    is_int8 = int8_weights.is_int8(checkpoint)
    reasons = {}
    for path, target in targets.items():
        names = _known_as(path, target.source)
        projection = standard_axes(path, len(target.float_leaf.shape))[0] is not None
        if target.contract_axes is not None or not projection or any(matches(n, FLOAT_BY_DEFAULT) for n in names):
            continue
        if any(matches(name, unwanted) for name in names):
            reasons[path] = "the quantization_config of the checkpoint's config.json keeps it so"
        elif is_int8:
            reasons[path] = "the checkpoint has it in floating point beside int8 weights"
    say_left_out(
        str(checkpoint.path),
        reasons,
        "They become int8 when the checkpoint in floating point is quantized."
        if is_int8
        else "include= (--include) quantizes them all the same.",
        quantizes=True,
    )


def _known_as(path: str, source: Source) -> tuple[str, ...]:
    """Our path of a parameter, and the checkpoint's names of the tensors that it is made of."""
    return (path, *(name.replace(".", "/") for name in source.tensors))


def _check_names(checkpoint: Checkpoint, found: dict[str, Source], config: ModelConfig) -> None:
    """Raises ValueError for tensors that are missing, and for ones that nothing is made of."""
    needed = {name for source in found.values() for name in source.tensors}
    for name in sorted(needed - set(checkpoint.tensors)):
        raise ValueError(f"{checkpoint.path}: Expected a tensor {name!r}, got none of that name.")
    known = needed | {name for name in checkpoint.tensors if ignored(name, config)}
    known |= {beside for name in known for beside in int8_weights.companions(checkpoint, name)}
    for name in sorted(set(checkpoint.tensors) - known):
        file = checkpoint.tensors[name].file
        raise ValueError(f"{file}: tensor {name!r}: Expected only tensors of a {config.family} model, got this.")


def is_transposed(checkpoint: Checkpoint, source: Source, name: str) -> bool:
    """Whether a tensor is stored as `[k, n]`: int8 and bitsandbytes' four bits never are, whatever the family's are."""
    if not source.transposed or four_bit_codes.is_packed(checkpoint, name):
        return False
    return not int8_weights.is_int8_weight(checkpoint, name)


def _check_shapes(checkpoint: Checkpoint, source: Source, shape: tuple[int, ...]) -> None:
    """Raises ValueError for tensors which, stacked above each other, don't have the rows and the width of `shape`.

    Each may have any number of rows, as only their sum is known: q, k and v differ.
    """
    infos = [checkpoint.tensors[name] for name in source.tensors]
    rows, width = math.prod(shape[: max(1, len(shape) - 1)]), shape[-1:] if len(shape) > 1 else ()
    got = []
    for info in infos:
        transposed = is_transposed(checkpoint, source, info.name)
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
