"""The directory that `jint8.save` writes: arrays in safetensors, the rest in JSON, a SHA-256 for each file.

This file knows arrays and JSON; `jint8._convert.saved` knows which arrays a quantized model consists of.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jint8.checkpoints._directory import new_directory, write_arrays, write_json, write_manifest
from jint8.checkpoints._json import read_json
from jint8.checkpoints._safetensors import SafetensorsCheckpoint
from jint8.checkpoints._tokenizer.huggingface import backend_from_file
from jint8.checkpoints._tokenizer.tokenizer import Tokenizer

METADATA = "jint8.json"
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
# Version 1 had the rows of fused projections in another order. Version 3 may have smoothed weights, which readers of
# version 2 don't know; a model without them is written as version 2.
VERSIONS = (2, 3)


class Jint8Checkpoint(SafetensorsCheckpoint):
    """A directory that `jint8.save` wrote.

    Attributes:
      metadata: the content of `jint8.json`.
    """

    format = "jint8"

    def __init__(self, path: Path):
        self.metadata = read_json(path / METADATA)
        if (version := self.metadata.get("version")) not in VERSIONS:
            raise ValueError(
                f"{path / METADATA}: Expected format version {' or '.join(map(str, VERSIONS))}, got {version!r}: "
                "convert the original checkpoint again, by this version of jint8"
            )
        super().__init__(path)

    def tokenizer(self) -> Tokenizer | None:
        ids = self.metadata.get("tokenizer")
        if ids is None:
            return None
        file = self.path / CHAT_TEMPLATE
        template = file.read_text(encoding="utf-8") if file.exists() else None
        backend = backend_from_file(self.path / TOKENIZER)
        try:
            return Tokenizer(backend, chat_template=template, **ids)
        except TypeError as e:
            raise ValueError(f"{self.path / METADATA}: Expected ids of special tokens, got {ids}: {e}") from e


def write_checkpoint(
    path: Path,
    arrays: Mapping[str, Any],
    *,
    metadata: Mapping[str, Any],
    config: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    shard_bytes: int,
) -> None:
    """Write a directory that `Jint8Checkpoint` reads. It appears complete or not at all.

    Args:
      path: where to write; nothing, or an empty directory.
      arrays: the arrays by name, on any device. They come to the host one shard at a time.
      metadata: what `jint8.json` says besides the tokenizer's special tokens; with the format version, of `VERSIONS`.
      config: what `config.json` says.
      tokenizer: the tokenizer, or None.
      shard_bytes: size that a safetensors file may have (a larger array has a file of its own).

    Raises:
      OSError: there is something at `path`, or it can't be written.
    """
    special = None
    with new_directory(path) as directory:
        write_arrays(directory, arrays, shard_bytes)
        if tokenizer is not None:
            special = {"bos_id": tokenizer.bos_id, "eos_ids": list(tokenizer.eos_ids), "pad_id": tokenizer.pad_id}
            tokenizer.backend.save(str(directory / TOKENIZER))
            if tokenizer.chat_template is not None:
                (directory / CHAT_TEMPLATE).write_text(tokenizer.chat_template, encoding="utf-8", newline="")
        write_json(directory / "config.json", config)
        write_json(directory / METADATA, {**metadata, "tokenizer": special})
        write_manifest(directory)
