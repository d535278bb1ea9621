"""The directory that `jint8.save` writes: arrays in safetensors, the rest in JSON, a SHA-256 for each file.

This file knows arrays and JSON; `jint8._convert.saved` knows which arrays a quantized model consists of.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jint8.checkpoints._checkpoint import TensorInfo
from jint8.checkpoints._destination import Destination
from jint8.checkpoints._directory import write_arrays, write_json, write_manifest, write_text
from jint8.checkpoints._json import read_json, read_text
from jint8.checkpoints._safetensors import SafetensorsCheckpoint
from jint8.checkpoints._sums import MANIFEST, checksum, read_manifest, sha256
from jint8.checkpoints._tokenizer.huggingface import backend_from_file
from jint8.checkpoints._tokenizer.tokenizer import Tokenizer

METADATA = "jint8.json"
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
PEEK = 4096  # bytes, of which hardly ever all are 0 in an array that isn't
# Version 1 had the rows of fused projections in another order. Version 3 may have smoothed weights, which readers of
# version 2 don't know; version 4 weights of four bits. A model is written in the first version that can have it.
VERSIONS = (2, 3, 4)


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
        self._checksums = self.metadata.get("checksums", {})
        if not isinstance(self._checksums, dict):
            raise ValueError(f"{path / METADATA}: Expected a dict as 'checksums', got {self._checksums!r}")
        self._compared: set[Path] = set()  # files, with their SHA-256
        super().__init__(path)

    def _read_rows(self, info: TensorInfo, start: int, stop: int) -> np.ndarray:
        values = super()._read_rows(info, start, stop)
        expected = self._checksums.get(info.name)
        if expected is None:  # jint8 0.1.0 wrote none
            if _is_zero(values):
                self._compare_file(info.file)
        # It is that of the whole array, of which one of several processes reads a part.
        elif values.nbytes == info.nbytes and (got := checksum(values)) != expected:
            self.check_unchanged()  # which explains it better
            raise ValueError(
                f"{info.file}: tensor {info.name!r}: Expected checksum {expected}, which {METADATA} has of it, got "
                f"{got}: the file is damaged"
            )
        return values

    def _compare_file(self, file: Path) -> None:
        """Compares a file that has an array of zeros, as a lost part of a file has, with its SHA-256, once."""
        if file in self._compared or not (self.path / MANIFEST).exists():
            return
        self._compared.add(file)
        expected = read_manifest(self.path).get(file.name)
        if expected is not None and (got := sha256(file)) != expected:
            self.check_unchanged()
            raise ValueError(f"{file}: Expected SHA-256 {expected}, got {got}: the file is damaged")

    def tokenizer(self) -> Tokenizer | None:
        ids = self.metadata.get("tokenizer")
        if ids is None:
            return None
        file = self.path / CHAT_TEMPLATE
        template = read_text(file) if file.exists() else None
        backend = backend_from_file(self.path / TOKENIZER)
        try:
            return Tokenizer(backend, chat_template=template, **ids)
        except TypeError as e:
            raise ValueError(f"{self.path / METADATA}: Expected ids of special tokens, got {ids}: {e}") from e


def _is_zero(array: np.ndarray) -> bool:
    raw = array.reshape(-1).view(np.uint8)  # NaN among floats would warn
    return not raw[:PEEK].any() and not raw.any()


def write_checkpoint(
    destination: Destination,
    arrays: Mapping[str, Any],
    *,
    metadata: Mapping[str, Any],
    config: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    shard_bytes: int,
) -> None:
    """Write a directory that `Jint8Checkpoint` reads, and complete it.

    Args:
      destination: where to write.
      arrays: the arrays by name, on any device. They come to the host one shard at a time.
      metadata: what `jint8.json` says besides the tokenizer's special tokens; with the format version, of `VERSIONS`.
      config: what `config.json` says.
      tokenizer: the tokenizer, or None.
      shard_bytes: size that a safetensors file may have (a larger array has a file of its own).

    Raises:
      OSError: it can't be written; the message names the file.
    """
    special = None
    written = write_arrays(destination, arrays, shard_bytes)
    if tokenizer is not None:
        special = {"bos_id": tokenizer.bos_id, "eos_ids": list(tokenizer.eos_ids), "pad_id": tokenizer.pad_id}
        write_tokenizer(destination, tokenizer)
    write_json(destination, "config.json", config)
    checksums = {name: array.checksum for name, array in written.items()}
    write_json(destination, METADATA, {**metadata, "tokenizer": special, "checksums": checksums})
    write_manifest(destination)
    destination.complete()


def write_tokenizer(destination: Destination, tokenizer: Tokenizer) -> None:
    """Write a tokenizer and its chat template. Raises OSError, which names the file, where the disk is full."""
    # As `backend.save` writes it, whose error on a full disk is a bare Exception.
    write_text(destination, TOKENIZER, tokenizer.backend.to_str(pretty=True))
    if tokenizer.chat_template is not None:
        write_text(destination, CHAT_TEMPLATE, tokenizer.chat_template)
