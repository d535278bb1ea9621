"""LoRA adapters of PEFT on top of a loaded model, int8 or not: `y = x W.T + scaling (x A.T) B.T`.

With DoRA, rows of `W + scaling B A` have the norms that the adapter says: as it is loaded, rows of W and of B are
scaled. Of an int8 weight these are its scales, so that nothing is rounded. `modules_to_save` are whole tensors in place
of the model's.

The factors lie beside the weight that they belong to: `lora_a` `[r, k]`, and `lora_b` `[n, r]` with the scaling in it.
Where several of a checkpoint's weights make up one of ours, as q, k and v do, so do their factors: A are stacked, and B
are the blocks on a diagonal, so that each output uses its own factors, `[B1 A1; B2 A2] = diag(B1, B2) [A1; A2]`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jint8._convert.assemble import decoder_shardings, place
from jint8._convert.initial_factors import float_weight, takes_initial_factors, with_initial
from jint8._convert.merge import placed_alike, requantized, row_factors, scaled_rows
from jint8._convert.quantize_rows import cast
from jint8._core.qtensor import is_qtensor
from jint8._trees.paths import leaf_paths
from jint8.checkpoints import Checkpoint
from jint8.checkpoints._json import read_json
from jint8.checkpoints._safetensors import read_arrays
from jint8.models import Decoder, Encoder
from jint8.models.families import sources, split_sizes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTORS = ("lora_a", "lora_b")
MAGNITUDE = "lora_magnitude_vector"

OTHER_ARITHMETIC = (  # options of PEFT that make more of an adapter than `B A` beside each weight
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "velora_config",
)

# Values of `init_lora_weights`, up to PEFT 0.21.2, which initializes also when it loads an adapter, before it reads the
# factors. With these it changes the factors alone.
KEEPS_WEIGHTS = ("gaussian", "eva", "orthogonal", "mica")
# With these it takes something out of the weights below that can't be known from them: it draws random numbers, or goes
# by data. ("pissa" and "olora" can be: `initial_factors`.)
CHANGES_WEIGHTS = ("corda", "loftq", "lora_ga")


def with_adapter(
    params: dict[str, Any],
    model: Decoder | Encoder,
    path: Path,
    mesh: Mesh | None = None,
    checkpoint: Checkpoint | None = None,
) -> dict[str, Any]:
    """`params` with the factors of the adapter at `path`.

    Args:
      params: of `model`; the arrays are shared with the result.
      model: the decoder or encoder.
      path: a directory with `adapter_config.json` and `adapter_model.safetensors`.
      mesh: the devices that `params` are sharded over; None is one device.
      checkpoint: that `params` were read from, for adapters that take something out of its weights.

    Returns:
      A tree with `lora_a` and `lora_b` beside the weights that the adapter is for; with DoRA these are scaled, and with
      `modules_to_save` others replaced.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: another kind of adapter than LoRA on projections, or factors that don't fit; the message names file
        and tensor.

    References:
      Hu et al., LoRA, 2021, arXiv 2106.09685, section 4.1.
      Liu et al., DoRA, 2024, arXiv 2402.09353, equation 5.
    """
    import scipy.linalg  # here, since it takes a while, and most models are loaded without an adapter

    config, file = read_json(path / CONFIG), path / WEIGHTS
    _check_config(config, path / CONFIG)
    factors = dict(read_arrays(file))
    init = config.get("init_lora_weights", True)
    shapes = {name: leaf.shape for name, leaf in leaf_paths(params, is_leaf=is_qtensor) if name.endswith("/weight")}
    result = jax.tree.map(lambda leaf: leaf, params, is_leaf=is_qtensor)  # new dictionaries around the same arrays
    if any(name.endswith(FACTORS) for name, _ in leaf_paths(params, is_leaf=is_qtensor)):
        raise ValueError(f"{path}: Expected a model without an adapter, got one that has factors already.")
    if config.get("modules_to_save"):
        given = set(factors)
        _replace_modules(result, model, factors, file)
        for module in config["modules_to_save"]:
            if not any(f".{module}." in name for name in given - set(factors)):
                raise ValueError(f"{file}: Expected a tensor of {module!r}, which is in modules_to_save, got none.")
    for name, source in sources(model.config, shapes, ()).items():
        modules = [tensor.removesuffix(".weight") for tensor in source.tensors]
        pairs = [[factors.pop(f"{PREFIX}{module}.lora_{f}.weight", None) for f in "AB"] for module in modules]
        magnitudes = [factors.pop(f"{PREFIX}{module}.{MAGNITUDE}", None) for module in modules]
        if all(factor is None for pair in pairs for factor in pair):
            continue
        if len(shapes[name]) != 2:
            raise ValueError(f"{file}: tensor {PREFIX + modules[0]!r}: Expected no factors for experts, got some.")
        rows, k = split_sizes(shapes[name], name, len(modules), model.config), shapes[name][1]
        a, b = [], []
        for module, n, (down, up) in zip(modules, rows, pairs, strict=True):
            where = f"{file}: tensor {PREFIX + module!r}"
            down, up = _checked_factors(where, down, up, n, k)
            scaling = _scaling(config, module, len(down))
            with np.errstate(over="ignore"):
                up = up * np.float32(scaling)
            if not np.isfinite(up).all():
                raise ValueError(f"{where}: Expected factors within float32 when they are scaled, got larger ones.")
            if len(down) and takes_initial_factors(init):
                _check_rank(config, module, len(down), path / CONFIG)
                w = float_weight(checkpoint, f"{module}.weight", source.transposed, init, path / CONFIG)
                try:
                    down, up = with_initial(init, (down, up), w, scaling)
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from None
            a.append(down)
            b.append(up)
        dora, norms = bool(config.get("use_dora")), []
        for module, n, down, norm in zip(modules, rows, a, magnitudes, strict=True):
            where, needed = f"{file}: tensor {PREFIX + module!r}", dora and len(down) > 0
            norms.append(_checked_magnitude(where, norm, n, needed))
        ups = scipy.linalg.block_diag(*b)
        new = {"lora_a": np.concatenate(a), "lora_b": ups if source.order is None else ups[source.order]}
        module = name.removesuffix("weight")
        placed = decoder_shardings({module + leaf: factor for leaf, factor in new.items()}, mesh)
        node = _node(result, name)
        node |= {leaf: place(cast(factor, model.dtype), placed.get(module + leaf)) for leaf, factor in new.items()}
        if dora:
            magnitude = np.concatenate(norms)
            magnitude = magnitude if source.order is None else magnitude[source.order]
            factor = row_factors(node["weight"], node["lora_a"], node["lora_b"], magnitude)
            for leaf in ("weight", "lora_b"):
                node[leaf] = placed_alike(scaled_rows(node[leaf], factor), node[leaf])
    for name in factors:
        raise ValueError(f"{file}: tensor {name!r}: Expected only factors of projections of this model, got this.")
    return result


def _node(tree: dict[str, Any], path: str) -> dict[str, Any]:
    """The dictionary that holds the parameter at `path`."""
    for parent in path.split("/")[:-1]:
        tree = tree[parent]
    return tree


def _replace_modules(
    params: dict[str, Any], model: Decoder | Encoder, tensors: dict[str, np.ndarray], file: Path
) -> None:
    """Replaces parameters of which `tensors` has all that they are made of, and takes these out of it.

    Raises:
      ValueError: a part of a parameter, a wrong shape, values that aren't finite, or a tied embedding.
    """
    leaves = dict(leaf_paths(params, is_leaf=is_qtensor))
    for path, source in sources(model.config, leaves, ()).items():
        names = [PREFIX + name for name in source.tensors]
        found = [tensors.pop(name) for name in names if name in tensors]
        if not found:
            continue
        leaf, where = leaves[path], f"{file}: tensor {names[0]!r}"
        if len(found) < len(names):
            raise ValueError(f"{where}: Expected all of {', '.join(names)}, got {len(found)} of them.")
        if path == "embedding" and model.config.tie_embeddings:
            raise ValueError(f"{where}: Expected no embedding for a model whose output head is tied to it, got one.")
        parts = [(part.T if source.transposed else part).astype(np.float32) for part in found]
        value = parts[0] if len(parts) == 1 else None
        if value is None and len({part.shape[1:] for part in parts}) == 1 and len(leaf.shape) < 3:
            value = np.concatenate(parts)
        if value is None or value.shape != leaf.shape:
            raise ValueError(f"{where}: Expected shape {leaf.shape}, got {[part.shape for part in parts]}.")
        if not np.isfinite(value).all():
            raise ValueError(f"{where}: Expected finite values, got NaN or infinity.")
        value = value if source.order is None else value[source.order]
        new = requantized(leaf, jax.numpy.asarray(value)) if is_qtensor(leaf) else cast(value, leaf.dtype)
        _node(params, path)[path.rpartition("/")[2]] = placed_alike(new, leaf)


def saved_factors(tensors: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """The factors in a checkpoint that `jint8.save` wrote, by path, in the shapes that the weights beside them ask for.

    The rank is that of the file, the other size that of the weight in `expected`.
    """
    found = {}
    for name, info in tensors.items():
        module, _, leaf = name.rpartition("/")
        if leaf in FACTORS and f"{module}/weight" in expected and len(info.shape) == 2:
            n, k = expected[f"{module}/weight"].shape
            shape = (info.shape[0], k) if leaf == "lora_a" else (n, info.shape[1])
            found[name] = jax.ShapeDtypeStruct(shape, expected[f"{module}/weight"].dtype)
    return found


def _check_config(config: Mapping[str, Any], file: Path) -> None:
    """Raises ValueError for an adapter that is of another kind, such as one that trains biases as well."""
    expected = {"peft_type": "LORA", "bias": "none", "use_qalora": False}
    for key, value in expected.items():
        if (got := config.get(key, value)) != value:
            raise ValueError(f"{file}: Expected {key} to be {value!r}, got {got!r}.")
    for key in OTHER_ARITHMETIC:
        if config.get(key):
            raise ValueError(f"{file}: Expected no {key}, got {config[key]!r}.")
    _check_init(config.get("init_lora_weights", True), file)
    if not _is_number(config.get("lora_alpha")):
        raise ValueError(f"{file}: Expected lora_alpha to be a number, got {config.get('lora_alpha')!r}.")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(map(_is_number, patterns.values())):
        raise ValueError(f"{file}: Expected alpha_pattern to have a number for each pattern, got {patterns!r}.")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{file}: Expected patterns in alpha_pattern, got {pattern!r}: {error}.") from None
    modules = config.get("modules_to_save") or []
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        raise ValueError(f"{file}: Expected modules_to_save to be a list of names, got {modules!r}.")


def _is_number(value: Any) -> bool:
    """Whether it is a number that float32 holds, as a factor of weights has to."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= float(np.finfo("f4").max)


def _check_init(init: Any, file: Path) -> None:
    """Raises ValueError for an `init_lora_weights` with which the factors aren't a difference from the weights."""
    name = init.lower() if isinstance(init, str) else init
    if isinstance(name, bool) or name is None or name in KEEPS_WEIGHTS or takes_initial_factors(init):
        return
    expected = ", ".join(["true", "false", *map(repr, (*KEEPS_WEIGHTS, "pissa", "olora"))])
    message = f"{file}: Expected init_lora_weights to be {expected}, got {init!r}"
    if isinstance(name, str) and (name in CHANGES_WEIGHTS or name.startswith("pissa_niter_")):
        message += (
            ", with which PEFT changes the model's own weights by what they alone don't say. Convert the adapter to "
            "plain LoRA: save_pretrained of PEFT with path_initial_model_for_weight_conversion, or merge it into the "
            "model"
        )
    raise ValueError(f"{message}.")


def _checked_factors(
    where: str, down: np.ndarray | None, up: np.ndarray | None, n: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Factors in float32; of rank 0 where a weight has none. Raises ValueError for ones that don't fit."""
    if down is None and up is None:
        return np.zeros((0, k), np.float32), np.zeros((n, 0), np.float32)
    if down is None or up is None:
        raise ValueError(f"{where}: Expected lora_A.weight and lora_B.weight, got one of them.")
    if down.ndim != 2 or up.ndim != 2 or down.shape[1] != k or up.shape != (n, len(down)):
        raise ValueError(f"{where}: Expected factors (r, {k}) and ({n}, r), got {down.shape} and {up.shape}.")
    down, up = down.astype(np.float32), up.astype(np.float32)
    if not (np.isfinite(down).all() and np.isfinite(up).all()):
        raise ValueError(f"{where}: Expected finite factors, got NaN or infinity.")
    return down, up


def _checked_magnitude(where: str, magnitude: np.ndarray | None, n: int, needed: bool) -> np.ndarray:
    """DoRA's norms of rows in float32; zeros where they stay. Raises ValueError for ones that don't fit."""
    if (magnitude is not None) != needed:
        expected, got = ("a", "none") if needed else ("no", "one")
        raise ValueError(f"{where}: Expected {expected} {MAGNITUDE}, got {got}.")
    if magnitude is None:
        return np.zeros(n, np.float32)
    magnitude = magnitude.astype(np.float32)
    if magnitude.shape != (n,):
        raise ValueError(f"{where}: Expected {MAGNITUDE} of shape ({n},), got {magnitude.shape}.")
    if not (np.isfinite(magnitude).all() and (magnitude > 0).all()):
        raise ValueError(f"{where}: Expected {MAGNITUDE} to be positive and finite, got others.")
    return magnitude


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """`alpha / rank`, or `alpha / sqrt(rank)` with `use_rslora`; the first match in `alpha_pattern` replaces alpha."""
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank) if rank else 0.0


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """What the first of PEFT's patterns that matches a module says."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return otherwise


def _check_rank(config: Mapping[str, Any], module: str, rank: int, file: Path) -> None:
    """Raises ValueError where the configuration has another rank than the factors: PEFT would take out another part."""
    try:
        expected = _by_pattern(config.get("rank_pattern"), module, config.get("r"))
    except (AttributeError, TypeError, re.error) as error:
        raise ValueError(f"{file}: Expected rank_pattern to have a rank for each pattern: {error}.") from None
    if expected != rank:
        raise ValueError(f"{file}: Expected r of {module!r} to be that of its factors, {rank}, got {expected!r}.")
