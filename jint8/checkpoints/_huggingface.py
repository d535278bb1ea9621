"""Writes a directory as Hugging Face's libraries read it."""

from collections.abc import Mapping
from typing import Any

from jint8.checkpoints._destination import Destination
from jint8.checkpoints._directory import write_arrays, write_json, write_manifest
from jint8.checkpoints._jint8 import write_tokenizer
from jint8.checkpoints._safetensors import INDEX
from jint8.checkpoints._tokenizer.tokenizer import Tokenizer


def write_huggingface(
    destination: Destination,
    arrays: Mapping[str, Any],
    *,
    config: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    shard_bytes: int,
) -> None:
    """Write a directory that `SafetensorsCheckpoint` and transformers read, and complete it.

    Args:
      destination: where to write.
      arrays: the arrays by their Hugging Face names.
      config: what `config.json` says.
      tokenizer: the tokenizer, or None.
      shard_bytes: size that a safetensors file may have (a larger array has a file of its own).

    Raises:
      OSError: it can't be written; the message names the file.
    """
    files = {name: written.file for name, written in write_arrays(destination, arrays, shard_bytes).items()}
    if len(set(files.values())) > 1:
        size = sum(array.nbytes for array in arrays.values())
        write_json(destination, INDEX, {"metadata": {"total_size": size}, "weight_map": files})
    if tokenizer is not None:
        write_tokenizer(destination, tokenizer)
        write_json(destination, "tokenizer_config.json", _tokenizer_config(tokenizer))
        write_json(destination, "generation_config.json", {"eos_token_id": list(tokenizer.eos_ids)})
    write_json(destination, "config.json", config)
    write_manifest(destination)
    destination.complete()


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    ids = {
        "bos_token": tokenizer.bos_id,
        "pad_token": tokenizer.pad_id,
        "eos_token": next(iter(tokenizer.eos_ids), None),
    }
    special = {name: tokenizer.backend.id_to_token(i) for name, i in ids.items() if i is not None}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **special}
