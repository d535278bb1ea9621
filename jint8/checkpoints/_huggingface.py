"""Writes a directory as Hugging Face's libraries read it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jint8.checkpoints._directory import new_directory, write_arrays, write_json, write_manifest
from jint8.checkpoints._jint8 import CHAT_TEMPLATE, TOKENIZER
from jint8.checkpoints._safetensors import INDEX
from jint8.checkpoints._tokenizer.tokenizer import Tokenizer


def write_huggingface(
    path: Path, arrays: Mapping[str, Any], *, config: Mapping[str, Any], tokenizer: Tokenizer | None, shard_bytes: int
) -> None:
    """Write a directory that `SafetensorsCheckpoint` and transformers read. It appears complete or not at all.

    Args:
      path: where to write; nothing, or an empty directory.
      arrays: the arrays by their Hugging Face names.
      config: what `config.json` says.
      tokenizer: the tokenizer, or None.
      shard_bytes: size that a safetensors file may have (a larger array has a file of its own).

    Raises:
      OSError: there is something at `path`, or it can't be written.
    """
    with new_directory(path) as directory:
        files = write_arrays(directory, arrays, shard_bytes)
        if len(set(files.values())) > 1:
            size = sum(array.nbytes for array in arrays.values())
            write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": files})
        if tokenizer is not None:
            tokenizer.backend.save(str(directory / TOKENIZER))
            write_json(directory / "tokenizer_config.json", _tokenizer_config(tokenizer))
            write_json(directory / "generation_config.json", {"eos_token_id": list(tokenizer.eos_ids)})
            if tokenizer.chat_template is not None:
                (directory / CHAT_TEMPLATE).write_text(tokenizer.chat_template, encoding="utf-8", newline="")
        write_json(directory / "config.json", config)
        write_manifest(directory)


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    ids = {
        "bos_token": tokenizer.bos_id,
        "pad_token": tokenizer.pad_id,
        "eos_token": next(iter(tokenizer.eos_ids), None),
    }
    special = {name: tokenizer.backend.id_to_token(i) for name, i in ids.items() if i is not None}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **special}
