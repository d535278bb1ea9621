"""`jint8.save`: a loaded model to disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

import jax.numpy as jnp

from jint8._convert.bitsandbytes import to_tensors
from jint8._convert.saved import to_arrays
from jint8._inference.language_model import LanguageModel
from jint8._inference.text_encoder import TextEncoder
from jint8.checkpoints._destination import Destination
from jint8.checkpoints._huggingface import write_huggingface
from jint8.checkpoints._jint8 import write_checkpoint

SHARD_BYTES = 4 * 2**30
Format = Literal["jint8", "bitsandbytes"]
FORMATS: tuple[Format, ...] = get_args(Format)


def save(
    path: str | os.PathLike[str],
    loaded: LanguageModel | TextEncoder,
    *,
    format: Format = "jint8",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Saves a model so that `jint8.load` gives back the same bits, on any device.

    The directory holds `model.safetensors` (or several), `config.json`, `tokenizer.json`, `jint8.json` with how the
    weights were quantized, and `SHA256SUMS`. It is written in a hidden directory beside `path`, which is renamed when
    it is complete; or inside `path`, where that is the current directory, a mount point, or in a folder that can't be
    written to. What an interrupted run left there is removed, with a warning, if its process has ended.

    With `format="bitsandbytes"` the directory is what PyTorch's transformers writes of a model that it loaded with
    `load_in_8bit`, and reads: `weight` int8, `SCB` (127 times the scales) and a `quantization_config`.

    Args:
      path: the directory to make; nothing, an empty directory or a link to one may be there.
      loaded: what `jint8.load` or `jint8.load_encoder` returned.
      format: `"jint8"`, or `"bitsandbytes"`.
      shard_bytes: the weights are split into files of at most this size.

    Raises:
      FileExistsError: there is something at `path`, or somebody else is writing it.
      OSError: it can't be written; the message names the file.
      ValueError: `loaded` doesn't know its Hugging Face configuration, `shard_bytes` isn't positive, an unknown
        `format`, or int8 weights that bitsandbytes can't have (affine, rotated, of embeddings or of experts).
    """
    check_format(format, shard_bytes)
    if loaded.hf_config is None:
        raise ValueError("Expected a model with its Hugging Face configuration in hf_config, got None.")
    with Destination(Path(path)) as destination:
        write_model(destination, loaded, format=format, shard_bytes=shard_bytes)


def check_format(format: str, shard_bytes: int = SHARD_BYTES) -> None:
    """Raises ValueError for arguments that `save` can't use."""
    if shard_bytes < 1:
        raise ValueError(f"Expected shard_bytes to be at least 1, got {shard_bytes}.")
    if format not in FORMATS:
        raise ValueError(f"Expected format to be one of {', '.join(FORMATS)}, got {format!r}.")


def write_model(
    destination: Destination,
    loaded: LanguageModel | TextEncoder,
    *,
    format: Format = "jint8",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """What `save` does, once there is a place to write.

    Args:
      destination: the place, which is complete afterwards.
      loaded, format, shard_bytes: as in `save`, checked.

    Raises:
      OSError, ValueError: as `save`.
    """
    assert loaded.hf_config is not None
    if format == "bitsandbytes":
        tensors, asked = to_tensors(loaded.params, loaded.config)
        config = {k: v for k, v in loaded.hf_config.items() if k != "torch_dtype"}
        config |= {"dtype": jnp.dtype(loaded.model.dtype).name, "quantization_config": asked}
        write_huggingface(destination, tensors, config=config, tokenizer=loaded.tokenizer, shard_bytes=shard_bytes)
        return
    # What it says of the weights is of the checkpoint that they came from; now jint8.json does.
    config = {k: v for k, v in loaded.hf_config.items() if k not in ("quantization_config", "compression_config")}
    arrays, metadata = to_arrays(loaded.params, quant=loaded.quant, dtype=loaded.model.dtype)
    write_checkpoint(
        destination,
        arrays,
        metadata=metadata,
        config=config,
        tokenizer=loaded.tokenizer,
        shard_bytes=shard_bytes,
    )
