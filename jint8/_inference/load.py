"""From a path to a model that runs: what `jint8.load` and `jint8.load_encoder` do, in `_load_fields`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.typing import DTypeLike

from jint8._convert.lora import saved_factors, with_adapter
from jint8._convert.read_params import Progress, read_params
from jint8._convert.saved import read_saved, saved_config, saved_dtype, saved_quantized
from jint8._convert.settings import resolve_settings
from jint8._convert.targets import abstract_float_params, check_sizes, needs_calibration
from jint8._convert.tied import with_own_head
from jint8._core.calibration import Calibration
from jint8._core.config import Config, check_config
from jint8._inference.language_model import LanguageModel
from jint8._inference.load_four_bits import load_four_bits
from jint8._inference.text_encoder import TextEncoder
from jint8._trees.paths import Patterns, Selection
from jint8.checkpoints import Checkpoint, open_checkpoint
from jint8.checkpoints._jint8 import Jint8Checkpoint
from jint8.checkpoints._sums import verify_files
from jint8.models import Decoder, Encoder, encoder_config, model_config
from jint8.models.families import text_config


def load(
    path: str | os.PathLike[str],
    *,
    config: Config | None = None,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    quantize: bool = True,
    skip: Patterns = (),
    include: Patterns = (),
    adapter: str | os.PathLike[str] | None = None,
    outliers: Mapping[str, Any] | None = None,
    calibrate: str | Literal[False] | None = None,
    verify: bool = False,
    progress: Progress | None = None,
) -> LanguageModel:
    """Loads a checkpoint, with its projection weights turned into int8 as they are read.

    One tensor at a time is in floating point. Embeddings, norms, biases and the output head keep floating point
    (`dtype`) unless `include` names them.

    Args:
      path: a GGUF file, a Hugging Face directory with `config.json` and safetensors files, or a directory that
        `jint8.save` wrote. Weights that it, bitsandbytes (`load_in_8bit`), llm-compressor, Quark or torchao saved in
        int8 come back as they are: `quantize`, `skip` and `include` don't apply. By the scheme `"int4"`, so do the
        codes of GGUF's Q4_0, Q4_1 and Q4_K. NF4 and FP4 of bitsandbytes are dequantized, and rounded again.
      config: how to quantize, and how to multiply. None is what the model was saved with, or what the
        `quantization_config` in `config.json` says (`Config(scheme="vector")` for int8 of llm-compressor, Quark and
        torchao, an `llm_int8_threshold` for bitsandbytes); or `Config()`.
      dtype: of activations and of the parameters that aren't quantized. None is what the model was saved with, or
        float32 on CPUs and bfloat16 on GPUs.
      mesh: the devices that the model is sharded over, by `jint8.models.partition_specs`. Each process reads the shards
        of its own devices; no device ever holds the whole. None is one device.
      quantize: False keeps every weight in `dtype`, whatever `config`, `skip` and `include` say; also of a model that
        was saved in floating point.
      skip: patterns or a predicate of weights that stay in floating point, besides the output head, the router of
        experts, and the `llm_int8_skip_modules` of a `quantization_config`. They are matched against our paths
        (`"layers_0/mlp/down"`) and the checkpoint's names, with dots as slashes (`"mlp/down_proj"`, `"lm_head"`). Where
        q, k and v or gate and up share a product, naming one keeps all of them.
      include: patterns or a predicate that win over `skip` and over the default.
      adapter: a directory in which PEFT saved a LoRA adapter; its factors are added in floating point.
      outliers: outlier feature dimensions by path, as `jint8.calibrate` returns; the config then has
        `outliers="static"`, unless it rotates without decomposition and only smooths by their `rms`. None, with a
        config that needs either: they are found on a text, which reads the checkpoint twice.
      calibrate: that text. None is a short one that comes with the package, or random tokens where there is no
        tokenizer; for `rounding="gptq"`, which needs more, 8,192 tokens that the model writes itself. False
        looks at no activations: a config that rotates then smooths by the weights alone.
      verify: compare all files with the SHA-256 sums that `jint8.save` wrote, before they are read. Checksums of the
        weights of a model that it saved, which cost next to nothing, are compared in any case.
      progress: called with (bytes read so far, bytes in all) of the checkpoint.

    Returns:
      A `LanguageModel`.

    Raises:
      FileNotFoundError: nothing at `path`, or a shard, a file of the adapter or the sums for `verify` are missing.
      OSError: a file can't be read, or is changed while it is.
      ValueError: an unsupported architecture, a truncated file, a tensor that is missing, unknown, or of a wrong shape,
        NaN or infinity in a weight, an adapter that doesn't fit, a file that fails `verify`, a weight whose size isn't
        a multiple of the devices in `mesh`; the message names file and tensor.
      TypeError: `dtype` isn't a float type.

    References:
      arXiv 2208.07339, abstract: "a 16/32-bit checkpoint can be loaded, converted to Int8, and used immediately".
    """
    if mesh is not None:
        # Auto leaves the shardings of activations to XLA. `jax.make_mesh` makes Explicit axes, which would have the
        # model's code name them.
        mesh = mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    fields = _load_fields(
        path,
        functools.partial(build_decoder, mesh=mesh),
        config=config,
        dtype=dtype,
        mesh=mesh,
        quantize=quantize,
        selection=Selection(skip, include),
        adapter=adapter,
        outliers=outliers,
        calibrate=calibrate,
        find_outliers=_find_outliers,
        verify=verify,
        progress=progress,
    )
    return LanguageModel(**fields)


def load_encoder(
    path: str | os.PathLike[str],
    *,
    config: Config | None = None,
    dtype: DTypeLike | None = None,
    quantize: bool = True,
    skip: Patterns = (),
    include: Patterns = (),
    adapter: str | os.PathLike[str] | None = None,
    verify: bool = False,
    progress: Progress | None = None,
) -> TextEncoder:
    """Loads an encoder (BERT, MiniLM) that turns texts into vectors, with its projection weights turned into int8.

    Args:
      path: a Hugging Face directory, or one that `jint8.save` wrote; also in int8, as in `jint8.load`.
      config: how to quantize, and how to multiply; this and the others as in `jint8.load`. An encoder isn't calibrated:
        a config that rotates smooths by the weights alone.
      dtype: of activations and of the parameters that aren't quantized.
      quantize: False keeps every weight in `dtype`, whatever `config`, `skip` and `include` say.
      skip: patterns or a predicate of weights that stay in floating point.
      include: patterns or a predicate that win over `skip` and over the default.
      adapter: a directory in which PEFT saved a LoRA adapter.
      verify: compare all files with the SHA-256 sums that `jint8.save` wrote.
      progress: called with (bytes read so far, bytes in all) of the checkpoint.

    Returns:
      A `TextEncoder`.

    Raises:
      FileNotFoundError: as `jint8.load`.
      OSError: as `jint8.load`.
      ValueError: as `jint8.load`; also for a decoder.
      TypeError: `dtype` isn't a float type.
    """
    fields = _load_fields(
        path,
        build_encoder,
        config=config,
        dtype=dtype,
        quantize=quantize,
        selection=Selection(skip, include),
        adapter=adapter,
        verify=verify,
        progress=progress,
    )
    return TextEncoder(**fields)


def _load_fields(
    path: str | os.PathLike[str],
    build: Callable[[Checkpoint, DTypeLike], Decoder | Encoder],
    *,
    config: Config | None,
    dtype: DTypeLike | None,
    quantize: bool,
    selection: Selection,
    adapter: str | os.PathLike[str] | None,
    verify: bool,
    progress: Progress | None,
    mesh: Mesh | None = None,
    outliers: Mapping[str, Any] | None = None,
    calibrate: str | Literal[False] | None = None,
    find_outliers: Callable[[dict[str, Any], str | None], Calibration] | None = None,
) -> dict[str, Any]:
    """The fields of a `LanguageModel` or a `TextEncoder`, read from a checkpoint.

    Arguments are those of `load`, and two by which both kinds of model differ: `build` makes the Flax module, and
    `find_outliers` finds the columns for static outliers, with the fields of a model and a text; it is None for a kind
    of model that can't.
    """
    if config is not None:
        check_config(config)
    if dtype is not None and not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise TypeError(f"Expected dtype to be a float type, got {jnp.dtype(dtype)}.")
    if verify:
        verify_files(Path(path))
    with open_checkpoint(path) as checkpoint, _on_the_host(mesh):
        if mesh is None:  # with one, another process may read most of it
            checkpoint.read_ahead()
        if isinstance(checkpoint, Jint8Checkpoint):
            asks_for_floats = not quantize and saved_quantized(checkpoint)
            if asks_for_floats or selection != Selection() or outliers is not None or calibrate is not None:
                raise ValueError(f"{path}: Expected a checkpoint in floating point, got one that jint8 saved.")
            config = config if quantize else None  # of a model that was saved in floating point
            quant = saved_config(checkpoint, config)
            model = build(checkpoint, saved_dtype(checkpoint) if dtype is None else dtype)
            expected = abstract_float_params(model)
            expected |= saved_factors(checkpoint.tensors, expected)
            params = read_saved(checkpoint, expected, config=config, dtype=dtype, mesh=mesh, progress=progress)
        else:
            quant, selection = resolve_settings(checkpoint, config=config, quantize=quantize, selection=selection)
            model = build(checkpoint, default_dtype() if dtype is None else dtype)
            read = functools.partial(read_params, checkpoint, model, selection=selection, mesh=mesh, progress=progress)
            if calibrate is not None and (outliers is not None or not quant.is_calibrated):
                raise ValueError(
                    f"{path}: Expected calibrate with static outliers that are to be found, or with rotate, got it "
                    "without."
                )
            text = None if calibrate is False else calibrate
            calibrates = find_outliers is not None and calibrate is not False
            finds = calibrates and outliers is None and needs_calibration(checkpoint, model, quant, selection)
            if outliers is not None:
                if not quantize:
                    raise ValueError(f"{path}: Expected outliers for weights in int8, got them with quantize=False.")
                if not quant.four_bits and (quant.table_row.decomposition or not quant.rotate):
                    quant = dataclasses.replace(quant, outliers="static")
            elif not calibrates and (quant.uses_calibrated_columns or quant.rounding == "gptq"):
                got = "calibrate=False" if find_outliers else "an encoder"
                wanted = "outliers by batch or by token" if quant.uses_calibrated_columns else "rounding='nearest'"
                raise ValueError(f"{path}: Expected {wanted} without calibration, got {got}.")
            elif finds and find_outliers is not None and not quant.four_bits:
                # Calibrated on a model that finds outliers token by token. Its parameters are dropped before those of
                # the result are read: both together may not fit.
                other = quant.for_calibration()
                dynamic = read(config=other)
                outliers = find_outliers(_fields(checkpoint, model, dynamic, other), text)
                del dynamic
            if finds and quant.four_bits and isinstance(model, Decoder):
                options: Any = {"selection": selection, "text": text, "mesh": mesh, "progress": progress}
                params = load_four_bits(checkpoint, model, config=quant, **options)
            else:
                params = read(config=quant, outliers=outliers)
        if adapter is not None:
            params = with_adapter(params, model, Path(adapter), mesh, checkpoint)
        return _fields(checkpoint, model, params, quant)


def _find_outliers(fields: dict[str, Any], text: str | None) -> Calibration:
    return LanguageModel(**fields).calibrate(text)


def _fields(checkpoint: Checkpoint, model: Decoder | Encoder, params: dict[str, Any], quant: Config) -> dict[str, Any]:
    hf_config = text_config(checkpoint.config)
    if isinstance(model, Decoder) and model_config(hf_config).tie_embeddings != model.config.tie_embeddings:
        hf_config["tie_word_embeddings"] = model.config.tie_embeddings  # what `save` writes loads as the same model
    return {
        "model": model,
        "params": params,
        "tokenizer": checkpoint.tokenizer(),
        "config": model.config,
        "quant": quant,
        "hf_config": hf_config,
    }


def _on_the_host(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """A context in which arrays are made on the host, where a model is sharded: no device holds more than its shard."""
    return contextlib.nullcontext() if mesh is None else jax.default_device(jax.local_devices(backend="cpu")[0])


def build_decoder(checkpoint: Checkpoint, dtype: DTypeLike, mesh: Mesh | None = None) -> Decoder:
    """The decoder of a checkpoint. Raises ValueError, naming the checkpoint, for one that isn't supported."""
    try:
        config = model_config(checkpoint.config)
        check_sizes(checkpoint, config)
        config = with_own_head(checkpoint, config)
        return Decoder(config, jnp.dtype(dtype), mesh)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from None


def build_encoder(checkpoint: Checkpoint, dtype: DTypeLike) -> Encoder:
    """The encoder of a checkpoint. Raises ValueError, naming the checkpoint, for one that isn't supported."""
    try:
        config = encoder_config(checkpoint.config)
        check_sizes(checkpoint, config)
        return Encoder(config, jnp.dtype(dtype))
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from None


def default_dtype() -> np.dtype:
    """The dtype of activations that nobody chose: float32 on CPUs, where 16-bit products are slow, else bfloat16."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
