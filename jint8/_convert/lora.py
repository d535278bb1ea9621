"""LoRA adapters of PEFT on top of a loaded model, int8 or not: `y = x W.T + scaling (x A.T) B.T`.

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
from jint8._convert.quantize_rows import cast
from jint8._core.qtensor import is_qtensor
from jint8._trees.paths import leaf_paths
from jint8.checkpoints._json import read_json
from jint8.checkpoints._safetensors import read_arrays
from jint8.models import Decoder, Encoder
from jint8.models.families import sources, split_sizes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTORS = ("lora_a", "lora_b")

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
# With these it takes something out of the weights below, so that the factors aren't a difference from them.
CHANGES_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def with_adapter(
    params: dict[str, Any], model: Decoder | Encoder, path: Path, mesh: Mesh | None = None
) -> dict[str, Any]:
    """`params` with the factors of the adapter at `path`.

    Args:
      params: of `model`; the arrays are shared with the result.
      model: the decoder or encoder.
      path: a directory with `adapter_config.json` and `adapter_model.safetensors`.
      mesh: the devices that `params` are sharded over; None is one device.

    Returns:
      A tree with `lora_a` and `lora_b` beside the weights that the adapter is for.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: another kind of adapter than LoRA on projections, or factors that don't fit; the message names file
        and tensor.

    References:
      Hu et al., LoRA, 2021, arXiv 2106.09685, section 4.1.
    """
    import scipy.linalg  # here, since it takes a while, and most models are loaded without an adapter

    config, file = read_json(path / CONFIG), path / WEIGHTS
    _check_config(config, path / CONFIG)
    factors = dict(read_arrays(file))
    shapes = {name: leaf.shape for name, leaf in leaf_paths(params, is_leaf=is_qtensor) if name.endswith("/weight")}
    result = jax.tree.map(lambda leaf: leaf, params, is_leaf=is_qtensor)  # new dictionaries around the same arrays
    for name, source in sources(model.config, shapes, ()).items():
        modules = [tensor.removesuffix(".weight") for tensor in source.tensors]
        pairs = [[factors.pop(f"{PREFIX}{module}.lora_{f}.weight", None) for f in "AB"] for module in modules]
        if all(factor is None for pair in pairs for factor in pair):
            continue
        if len(shapes[name]) != 2:
            raise ValueError(f"{file}: tensor {PREFIX + modules[0]!r}: Expected no factors for experts, got some.")
        rows, k = split_sizes(shapes[name], name, len(modules), model.config), shapes[name][1]
        a, b = [], []
        for module, n, (down, up) in zip(modules, rows, pairs, strict=True):
            down, up = _checked_factors(f"{file}: tensor {PREFIX + module!r}", down, up, n, k)
            a.append(down)
            b.append(up * _scaling(config, module, len(down)))
        ups = scipy.linalg.block_diag(*b)
        new = {"lora_a": np.concatenate(a), "lora_b": ups if source.order is None else ups[source.order]}
        module = name.removesuffix("weight")
        placed = decoder_shardings({module + leaf: factor for leaf, factor in new.items()}, mesh)
        *parents, _ = name.split("/")
        node = result
        for parent in parents:
            node = node[parent]
        node |= {leaf: place(cast(factor, model.dtype), placed.get(module + leaf)) for leaf, factor in new.items()}
    for name in factors:
        raise ValueError(f"{file}: tensor {name!r}: Expected only factors of projections of this model, got this.")
    return result


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
    """Raises ValueError for an adapter that isn't `B A` alone, such as one that trains biases as well."""
    expected = {"peft_type": "LORA", "bias": "none", "use_dora": False, "use_qalora": False}
    for key, value in expected.items():
        if (got := config.get(key, value)) != value:
            raise ValueError(f"{file}: Expected {key} to be {value!r}, got {got!r}.")
    for key in OTHER_ARITHMETIC:
        if config.get(key):
            raise ValueError(f"{file}: Expected no {key}, got {config[key]!r}.")
    _check_init(config.get("init_lora_weights", True), file)
    if not isinstance(config.get("lora_alpha"), (int, float)):
        raise ValueError(f"{file}: Expected lora_alpha to be a number, got {config.get('lora_alpha')!r}.")


def _check_init(init: Any, file: Path) -> None:
    """Raises ValueError for an `init_lora_weights` with which the factors aren't a difference from the weights."""
    name = init.lower() if isinstance(init, str) else init
    if isinstance(name, bool) or name is None or name in KEEPS_WEIGHTS:
        return
    expected = ", ".join(["true", "false", *map(repr, KEEPS_WEIGHTS)])
    message = f"{file}: Expected init_lora_weights to be {expected}, got {init!r}"
    if isinstance(name, str) and (name in CHANGES_WEIGHTS or name.startswith("pissa_niter_")):
        message += (
            ", with which PEFT changes the model's own weights. Convert the adapter to plain LoRA: "
            "save_pretrained of PEFT with path_initial_model_for_weight_conversion, or merge it into the model"
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


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """`alpha / rank`, or `alpha / sqrt(rank)` with `use_rslora`; the first match in `alpha_pattern` replaces alpha."""
    alpha = config["lora_alpha"]
    for pattern, other in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = other
            break
    return alpha / (rank**0.5 if config.get("use_rslora") else rank) if rank else 0.0
