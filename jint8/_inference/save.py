"""A loaded model to disk and back, every bit of it.

An array `a/b` of the parameters is saved under that name; a `QTensor` as its arrays, `a/b#q`, `a/b#scale` and so on,
and its other fields in JSON. Fields come from the dataclass, so that new ones need no change here.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jint8._convert.assemble import decoder_shardings, place
from jint8._convert.bitsandbytes import to_tensors
from jint8._core.config import SCHEMES, Config
from jint8._core.qtensor import QTensor, is_qtensor
from jint8._inference.language_model import LanguageModel
from jint8._inference.text_encoder import TextEncoder
from jint8._trees.params import with_config
from jint8._trees.paths import leaf_paths, nested
from jint8.checkpoints._huggingface import write_huggingface
from jint8.checkpoints._jint8 import METADATA, Jint8Checkpoint, write_checkpoint

SHARD_BYTES = 4 * 2**30
FORMATS = ("jint8", "bitsandbytes")


def save(
    path: str | os.PathLike[str],
    loaded: LanguageModel | TextEncoder,
    *,
    format: str = "jint8",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Saves a model so that `jint8.load` gives back the same bits, on any device.

    The directory holds `model.safetensors` (or several), `config.json`, `tokenizer.json`, `jint8.json` with how the
    weights were quantized, and `SHA256SUMS`. It is written beside `path` and renamed when it is complete.

    With `format="bitsandbytes"` the directory is what PyTorch's transformers writes of a model that it loaded with
    `load_in_8bit`, and reads: `weight` int8, `SCB` (127 times the scales) and a `quantization_config`.

    Args:
      path: the directory to make; nothing or an empty directory may be there.
      loaded: what `jint8.load` or `jint8.load_encoder` returned.
      format: `"jint8"`, or `"bitsandbytes"`.
      shard_bytes: the weights are split into files of at most this size.

    Raises:
      FileExistsError: there is something at `path`.
      OSError: it can't be written.
      ValueError: `loaded` doesn't know its Hugging Face configuration, `shard_bytes` isn't positive, an unknown
        `format`, or int8 weights that bitsandbytes can't have (affine, of embeddings or of experts).
    """
    if loaded.hf_config is None:
        raise ValueError("Expected a model with its Hugging Face configuration in hf_config, got None.")
    if shard_bytes < 1:
        raise ValueError(f"Expected shard_bytes to be at least 1, got {shard_bytes}.")
    if format not in FORMATS:
        raise ValueError(f"Expected format to be one of {', '.join(FORMATS)}, got {format!r}.")
    if format == "bitsandbytes":
        tensors, asked = to_tensors(loaded.params, loaded.config)
        config = {k: v for k, v in loaded.hf_config.items() if k != "torch_dtype"}
        config |= {"dtype": jnp.dtype(loaded.model.dtype).name, "quantization_config": asked}
        write_huggingface(Path(path), tensors, config=config, tokenizer=loaded.tokenizer, shard_bytes=shard_bytes)
        return
    leaves = leaf_paths(loaded.params, is_leaf=is_qtensor)
    metadata = {
        "dtype": jnp.dtype(loaded.model.dtype).name,
        "quant": _encode(loaded.quant),
        "weights": {path: _describe(leaf) for path, leaf in leaves if is_qtensor(leaf)},
    }
    write_checkpoint(
        Path(path),
        {name: array for path, leaf in leaves for name, array in _arrays(path, leaf)},
        metadata=metadata,
        config=loaded.hf_config,
        tokenizer=loaded.tokenizer,
        shard_bytes=shard_bytes,
    )


def saved_dtype(checkpoint: Jint8Checkpoint) -> Any:
    """The dtype of activations that a model was saved with."""
    name = _field(checkpoint, "dtype", str)
    try:
        return jnp.dtype(name)
    except TypeError as error:
        raise ValueError(f"{checkpoint.path / METADATA}: Expected a dtype, got {name!r}: {error}") from None


def saved_config(checkpoint: Jint8Checkpoint, config: Config | None) -> Config:
    """The Config to run a saved model with: its own, or `config` where its weights allow that.

    Raises:
      ValueError: `config` is for weights of another kind.
    """
    own = _decode_config(checkpoint, _field(checkpoint, "quant", dict))
    if config is None:
        return own
    wanted, got = SCHEMES[config.scheme], SCHEMES[own.scheme]
    if (wanted.weights, wanted.affine) != (got.weights, got.affine):
        raise ValueError(
            f"{checkpoint.path}: Expected a scheme that runs on weights quantized by {own.scheme!r}, got "
            f"{config.scheme!r}: quantize the original checkpoint instead."
        )
    return config


def read_saved(
    checkpoint: Jint8Checkpoint,
    expected: dict[str, jax.ShapeDtypeStruct],
    *,
    config: Config | None = None,
    dtype: Any = None,
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The parameters of a saved model.

    Args:
      checkpoint: what `save` wrote.
      expected: the shape of each parameter, by path.
      config: rewrites that of every `QTensor`; None keeps them.
      dtype: of the parameters in floating point, and of what a `QTensor` stands for; None keeps them.
      mesh: divides them among its devices, of which each gets what it holds; None is one device.
      progress: called with (bytes read so far, bytes in all).

    Raises:
      ValueError: an array is missing, unknown or of a wrong shape; the message names it.
    """
    weights = _field(checkpoint, "weights", dict)
    names: dict[str, dict[str, str]] = {}  # of the arrays, by path and field
    for name in checkpoint.tensors:
        path, _, field = name.partition("#")
        names.setdefault(path, {})[field] = name
    if missing := sorted(expected.keys() - names.keys()):
        raise ValueError(f"{checkpoint.path}: Expected a tensor {missing[0]!r}, got none of that name.")
    if unknown := sorted((names.keys() | weights.keys()) - expected.keys()):
        raise ValueError(f"{checkpoint.path}: tensor {unknown[0]!r}: Expected only this model's tensors, got this.")
    total, done = sum(info.nbytes for info in checkpoint.tensors.values()), 0
    params: dict[str, Any] = {}
    for path, fields in names.items():
        arrays = {field: checkpoint.read(name) for field, name in fields.items()}  # in the mapped file
        try:
            leaf = _leaf(checkpoint, arrays, weights.get(path), expected[path].shape)
        except (KeyError, TypeError, ValueError) as error:
            file = checkpoint.tensors[next(iter(fields.values()))].file
            got = ", ".join(f"{field} {array.dtype}{array.shape}".lstrip() for field, array in arrays.items())
            raise ValueError(f"{file}: tensor {path!r}: Expected {error}, got {got}.") from None
        placed = decoder_shardings({path: leaf}, mesh)
        leaf = jax.tree.map(place, leaf, *placed.values()) if placed else jax.tree.map(jnp.array, leaf)
        if dtype is not None:
            leaf = dataclasses.replace(leaf, dtype=jnp.dtype(dtype)) if is_qtensor(leaf) else leaf.astype(dtype)
        params[path] = leaf
        done += sum(array.nbytes for array in arrays.values())
        if progress is not None:
            progress(done, total)
    tree = nested(params)
    return tree if config is None else with_config(tree, config)


def _arrays(path: str, leaf: Any) -> Iterator[tuple[str, Any]]:
    if not is_qtensor(leaf):
        yield path, leaf
        return
    for field, value in _fields(leaf):
        if _is_array(value):
            yield f"{path}#{field}", value


def _describe(leaf: QTensor) -> dict[str, Any]:
    """Which fields are arrays, and the values of the others."""
    fields = _fields(leaf)
    static = {field: _encode(value) for field, value in fields if not _is_array(value)}
    return {"arrays": [field for field, value in fields if _is_array(value)], "fields": static}


def _fields(leaf: QTensor) -> list[tuple[str, Any]]:
    return [(field.name, getattr(leaf, field.name)) for field in dataclasses.fields(leaf)]


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "nbytes")


def _leaf(
    checkpoint: Jint8Checkpoint, arrays: dict[str, np.ndarray], described: dict[str, Any] | None, shape: tuple[int, ...]
) -> Any:
    """A parameter out of its arrays. Raises with what was expected of them."""
    wanted = [""] if described is None else described["arrays"]
    if arrays.keys() != set(wanted):
        raise ValueError(f"arrays {', '.join(wanted)}" if described else "one array")
    leaf = arrays[""] if described is None else _qtensor(checkpoint, arrays, described["fields"])
    if leaf.shape != shape:
        raise ValueError(f"shape {shape}")
    return leaf


def _qtensor(checkpoint: Jint8Checkpoint, arrays: dict[str, np.ndarray], static: dict[str, Any]) -> QTensor:
    fields: dict[str, Any] = {name: _tuples(value) for name, value in static.items()} | arrays
    fields |= {"dtype": jnp.dtype(static["dtype"]), "config": _decode_config(checkpoint, static["config"])}
    w = QTensor(**fields)
    for name, dtype in (("q", jnp.int8), ("scale", jnp.float32), ("outlier_rows", jnp.float16)):
        if getattr(w, name) is not None and getattr(w, name).dtype != dtype:
            raise TypeError(f"{name} in {jnp.dtype(dtype)}")
    if any(array.ndim != w.q.ndim for array in arrays.values()):
        raise ValueError(f"arrays of {w.q.ndim} dimensions")
    if any(size not in (1, full) for size, full in zip(w.scale.shape, w.q.shape, strict=True)):
        raise ValueError(f"a scale for q of shape {w.q.shape}")
    return w


def _encode(value: Any) -> Any:
    """A static field as JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if value is None or isinstance(value, (bool, int, float, str, list, tuple)):
        return value
    return jnp.dtype(value).name


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _decode_config(checkpoint: Jint8Checkpoint, value: dict[str, Any]) -> Config:
    try:
        return Config(**{name: _tuples(option) for name, option in value.items()})
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{checkpoint.path / METADATA}: Expected a config, got {value}: {error}") from None


def _field(checkpoint: Jint8Checkpoint, name: str, kind: type) -> Any:
    value = checkpoint.metadata.get(name)
    if not isinstance(value, kind):
        raise ValueError(f"{checkpoint.path / METADATA}: Expected a {kind.__name__} as {name!r}, got {value!r}.")
    return value
