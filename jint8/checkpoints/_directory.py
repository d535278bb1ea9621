"""The files of a directory that is being written: arrays, JSON, texts, the manifest of their SHA-256 sums."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jint8.checkpoints._optional import require
from jint8.checkpoints._sums import MANIFEST, checksum
from jint8.checkpoints._sums import sha256 as sha256

if TYPE_CHECKING:
    from jint8.checkpoints._destination import Destination


class Written(NamedTuple):
    """The name of the file that an array was written to, and the array's checksum."""

    file: str
    checksum: str


def write_arrays(destination: Destination, arrays: Mapping[str, Any], shard_bytes: int) -> dict[str, Written]:
    """Write arrays to one or more safetensors files; they come to the host one file at a time.

    Args:
      destination: where to write them.
      arrays: the arrays by name, on any device.
      shard_bytes: size that a file may have (a larger array has a file of its own).

    Returns:
      Of each array, its file and checksum.

    Raises:
      OSError: they can't be written.
    """
    destination.check_space(sum(array.nbytes for array in arrays.values()))
    shards = _shards(arrays, shard_bytes)
    written: dict[str, Written] = {}
    for i, names in enumerate(shards, 1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        on_host = {name: np.asarray(arrays[name], order="C") for name in names}
        with destination.naming(file):
            _save_arrays(on_host, destination.directory / file)
        written |= {name: Written(file, checksum(array)) for name, array in on_host.items()}
    return written


def write_manifest(destination: Destination) -> None:
    """Write the SHA-256 of every file that is there."""
    with destination.naming(MANIFEST):
        sums = [f"{sha256(file)}  {file.name}\n" for file in sorted(destination.directory.iterdir())]
    write_text(destination, MANIFEST, "".join(sums))


def write_json(destination: Destination, name: str, value: Mapping[str, Any]) -> None:
    """Write a JSON object as indented UTF-8."""
    write_text(destination, name, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(destination: Destination, name: str, text: str) -> None:
    """Write a text as it is, in UTF-8. Raises OSError, which names the file, where the disk is full."""
    with destination.naming(name):
        (destination.directory / name).write_text(text, encoding="utf-8", newline="")


def _shards(arrays: Mapping[str, Any], shard_bytes: int) -> list[list[str]]:
    """The names that go into each file: in order, and each file filled before the next one is begun."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, array in arrays.items():
        if shards[-1] and filled + array.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += array.nbytes
    return shards


def _save_arrays(arrays: Mapping[str, np.ndarray], file: Path) -> None:
    try:
        require("safetensors.numpy").save_file(arrays, file, metadata={"format": "pt"})
    except require("safetensors").SafetensorError as e:  # also when the disk is full, which callers know as OSError
        if number := re.search(r"\(os error (\d+)\)", str(e)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from e
        raise OSError(f"{file.name}: {e}") from e


def _sync(path: Path) -> None:
    """Wait until the disk holds a file's content, or the names in a directory."""
    if path.is_dir() and os.name == "nt":  # Windows can't open directories
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
