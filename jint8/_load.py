"""From a checkpoint to a model that runs: tensors become int8 as they are read."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jint8._language_model import LanguageModel
from jint8._params import OUTPUT_HEADS, standard_axes
from jint8._paths import Patterns, leaf_paths, matches
from jint8._quantize import quantize as quantize_weight
from jint8._save import read_saved, saved_config, saved_dtype
from jint8._types import SCHEMES, Config, QTensor
from jint8.checkpoints import Checkpoint, open_checkpoint
from jint8.checkpoints._jint8 import Jint8Checkpoint, verify_files
from jint8.models import Decoder, ModelConfig, model_config
from jint8.models._names import ignored, sources

Progress = Callable[[int, int], None]


def load(
    path: str | os.PathLike[str],
    *,
    config: Config | None = None,
    dtype: Any = None,
    quantize: bool = True,
    skip: Patterns = (),
    include: Patterns = (),
    outliers: Mapping[str, Any] | None = None,
    calibrate: str | None = None,
    verify: bool = False,
    progress: Progress | None = None,
) -> LanguageModel:
    """Loads a checkpoint, with its projection weights turned into int8 as they are read.

    One tensor at a time is in floating point. Embeddings, norms, biases and the output head keep floating point
    (`dtype`) unless `include` names them.

    Args:
      path: a GGUF file, a Hugging Face directory with `config.json` and safetensors files, or a directory that
        `jint8.save` wrote. The weights of the last come back as they are: `quantize`, `skip` and `include` don't apply.
      config: how to quantize, and how to multiply. None is `Config()`, or what the model was saved with.
      dtype: of activations and of the parameters that aren't quantized. None is what the model was saved with, or
        float32 on CPUs and bfloat16 on GPUs.
      quantize: False keeps every weight in `dtype`.
      skip: patterns or a predicate of weights that stay in floating point, besides the output head. They are matched
        against our paths (`"layers_0/mlp/down"`) and the checkpoint's names, with dots as slashes (`"mlp/down_proj"`
        and `"lm_head"`). Where q, k and v or gate and up share a product, naming one keeps all of them.
      include: patterns or a predicate that win over `skip` and over the default.
      outliers: outlier feature dimensions by path, as `jint8.calibrate` returns; the config then has
        `outliers="static"`. None, with such a config: they are found on a text, which reads the checkpoint twice.
      calibrate: that text. None is a short one that comes with the package.
      verify: compare the files with the SHA-256 sums that `jint8.save` wrote.
      progress: called with (bytes read so far, bytes in all) of the checkpoint.

    Returns:
      A `LanguageModel`.

    Raises:
      FileNotFoundError: nothing at `path`, or a shard is missing.
      ValueError: an unsupported architecture, a truncated file, a tensor that is missing, unknown, or of a wrong shape,
        NaN or infinity in a weight, a file that fails `verify`; the message names file and tensor.
      TypeError: `dtype` isn't a float type.

    References:
      arXiv 2208.07339, abstract: "a 16/32-bit checkpoint can be loaded, converted to Int8, and used immediately".
    """
    if dtype is not None and not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise TypeError(f"Expected dtype to be a float type, got {jnp.dtype(dtype)}.")
    if verify:
        verify_files(Path(path))
    with open_checkpoint(path) as checkpoint:
        if isinstance(checkpoint, Jint8Checkpoint):
            if not quantize or skip or include or outliers is not None or calibrate is not None:
                raise ValueError(f"{path}: Expected a checkpoint in floating point, got one that jint8 saved.")
            quant = saved_config(checkpoint, config)
            model = decoder(checkpoint, saved_dtype(checkpoint) if dtype is None else dtype)
            params = read_saved(checkpoint, abstract_params(model), config=config, dtype=dtype, progress=progress)
        else:
            quant = (config or Config()) if quantize else Config(scheme="none")
            model = decoder(checkpoint, default_dtype() if dtype is None else dtype)
            read = functools.partial(read_params, checkpoint, model, skip=skip, include=include, progress=progress)
            if outliers is not None:
                quant = dataclasses.replace(quant, outliers="static")
            elif quant.outliers == "static" and quant.decomposes:
                params = read(config=dataclasses.replace(quant, outliers="token"))
                outliers = _language_model(checkpoint, model, params, quant).calibrate(calibrate)
                del params
            params = read(config=quant, outliers=outliers)
        return _language_model(checkpoint, model, params, quant)


def _language_model(checkpoint: Checkpoint, model: Decoder, params: Any, quant: Config) -> LanguageModel:
    return LanguageModel(
        model=model,
        params=params,
        tokenizer=checkpoint.tokenizer(),
        config=model.config,
        quant=quant,
        hf_config=checkpoint.config,
    )


def decoder(checkpoint: Checkpoint, dtype: Any) -> Decoder:
    """The model of a checkpoint. Raises ValueError, naming the checkpoint, for one that isn't supported."""
    try:
        return Decoder(model_config(checkpoint.config), jnp.dtype(dtype))
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from None


def default_dtype() -> np.dtype:
    """float32 on CPUs, where 16-bit products are slow, bfloat16 elsewhere."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def read_params(
    checkpoint: Checkpoint,
    model: Decoder,
    *,
    config: Config,
    skip: Patterns = (),
    include: Patterns = (),
    outliers: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The parameters of `model` out of `checkpoint`; see `load`."""
    names = sources(model.config)
    if unknown := sorted(set(outliers or ()) - set(names)):
        raise ValueError(f"Expected the outliers' paths to be parameters, got {', '.join(unknown)}.")
    expected = abstract_params(model)
    _check_names(checkpoint, names, model.config)
    total = sum(checkpoint.tensors[name].nbytes for parts in names.values() for name in parts)
    done = 0
    params: dict[str, Any] = {}
    for path, parts in names.items():
        _check_shapes(checkpoint, parts, expected[path].shape)
        axes = _quantized_axes(path, parts, len(expected[path].shape), config, skip, include)
        pieces = []
        for name in parts:
            try:
                pieces.append(_convert(checkpoint.read(name), axes, config, model.dtype, (outliers or {}).get(path)))
            except ValueError as error:
                raise ValueError(f"{checkpoint.tensors[name].file}: tensor {name!r}: {error}") from None
            done += checkpoint.tensors[name].nbytes
            if progress is not None:
                progress(done, total)
        *parents, leaf = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = _stack(pieces)
    return params


def abstract_params(model: Decoder) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a model's float parameters, by path."""
    tree = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32))
    return dict(leaf_paths(tree))


def planned_params(
    checkpoint: Checkpoint, model: Decoder, *, config: Config, skip: Patterns = (), include: Patterns = ()
) -> dict[str, Any]:
    """What `read_params` would return, by path and without values: `jax.ShapeDtypeStruct`s, and `QTensor`s of them."""
    names = sources(model.config)
    expected = abstract_params(model)
    _check_names(checkpoint, names, model.config)
    planned: dict[str, Any] = {}
    for path, parts in names.items():
        _check_shapes(checkpoint, parts, expected[path].shape)
        axes = _quantized_axes(path, parts, len(expected[path].shape), config, skip, include)
        planned[path] = expected[path]
        if axes is not None:
            quantize = functools.partial(quantize_weight, contract_axes=axes, config=config)
            planned[path] = jax.eval_shape(quantize, expected[path])
    return planned


def _quantized_axes(path, parts, ndim, config, skip, include) -> tuple[int, ...] | None:
    """The contracted axes of a weight that becomes int8, None for one that stays in floating point."""
    if SCHEMES[config.scheme].weights is None:
        return None
    known_as = (path, *(name.replace(".", "/") for name in parts))
    included = any(matches(name, include) for name in known_as)
    if path == "embedding":
        return (1,) if included else None
    axes, _ = standard_axes(path, ndim)
    skipped = any(matches(name, OUTPUT_HEADS) or matches(name, skip) for name in known_as)
    return None if skipped and not included else axes


def _convert(
    value: np.ndarray, axes: tuple[int, ...] | None, config: Config, dtype, outliers=None
) -> jax.Array | QTensor:
    """A tensor of the checkpoint as a piece of a parameter."""
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"Expected floating point values, got {array.dtype}.")
    if axes is None:
        return array.astype(dtype)
    return dataclasses.replace(
        quantize_weight(array, contract_axes=axes, config=config, outliers=outliers), dtype=dtype
    )


def _stack(pieces: list[Any]) -> Any:
    """Arrays or `QTensor`s `[n, k]`, one above the other."""
    if len(pieces) == 1:
        return pieces[0]
    stacked = jax.tree.map(lambda *rows: jnp.concatenate(rows), *pieces)
    if isinstance(stacked, QTensor):  # outlier columns are those of the common input
        stacked = dataclasses.replace(stacked, outlier_index=pieces[0].outlier_index)
    return stacked


def _check_names(checkpoint: Checkpoint, names: dict[str, tuple[str, ...]], config: ModelConfig) -> None:
    wanted = {name for parts in names.values() for name in parts}
    for name in sorted(wanted - set(checkpoint.tensors)):
        raise ValueError(f"{checkpoint.path}: Expected a tensor {name!r}, got none of that name.")
    for name in sorted(set(checkpoint.tensors) - wanted):
        if not ignored(name, config):
            file = checkpoint.tensors[name].file
            raise ValueError(f"{file}: tensor {name!r}: Expected only tensors of a {config.family} model, got this.")


def _check_shapes(checkpoint: Checkpoint, parts: Sequence[str], shape: tuple[int, ...]) -> None:
    infos = [checkpoint.tensors[name] for name in parts]
    for info in infos:
        if len(info.shape) != len(shape) or info.shape[1:] != shape[1:]:
            expected = ", ".join(map(str, ("n", *shape[1:])))
            raise ValueError(f"{info.file}: tensor {info.name!r}: Expected shape ({expected}), got {info.shape}.")
    if sum(info.shape[0] for info in infos) != shape[0]:
        got = " and ".join(f"{info.shape[0]} in {info.name!r}" for info in infos)
        raise ValueError(f"{infos[0].file}: Expected {shape[0]} rows, got {got}.")
