"""Directories that are written whole or not at all, with the SHA-256 sums of their files."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jint8.checkpoints._optional import require

MANIFEST = "SHA256SUMS"  # in the format of the command sha256sum, which can check a directory without jint8


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill that becomes `path` when the block ends, and vanishes when it raises.

    Args:
      path: nothing, or an empty directory.

    Yields:
      A hidden directory beside `path`.

    Raises:
      FileExistsError: there is something at `path`.
    """
    check_destination(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield directory
        umask = os.umask(0)  # the only way to read it is to set it
        os.umask(umask)
        for file in [*directory.iterdir(), directory]:
            # mkdtemp and safetensors let only the owner read what they make; give it the user's usual permissions
            file.chmod((0o777 if file.is_dir() else 0o666) & ~umask)
            _sync(file)
        # Content is on the disk before the name is: a power failure leaves the old state or the whole directory.
        directory.replace(path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def check_destination(path: Path) -> None:
    """Raise FileExistsError unless `path` is nothing or an empty directory."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path}: Expected nothing or an empty directory there, got something")


def verify_files(path: Path) -> None:
    """Compare every file of a directory with the manifest.

    Args:
      path: what `jint8.save` wrote.

    Raises:
      FileNotFoundError: the manifest, or a file that it lists, is missing.
      ValueError: a file differs, or isn't in the manifest.
    """
    manifest = path / MANIFEST
    if not manifest.exists():
        raise FileNotFoundError(f"{manifest}: Expected this file, which jint8.save writes, got none")
    sums = {}
    for line in manifest.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        if Path(name).name != name or not name:
            raise ValueError(f"{manifest}: Expected lines of a SHA-256 and a file name, got {line!r}")
        sums[name] = digest
    for file in sorted(path.iterdir()):
        # a file that jint8.load would read without its sum having been compared
        if file.suffix in (".safetensors", ".json", ".jinja") and file.name not in sums:
            raise ValueError(f"{file}: Expected only files that {MANIFEST} lists, got this")
    for name, digest in sums.items():
        if not (path / name).exists():
            raise FileNotFoundError(f"{path / name}: Expected this file, which {MANIFEST} lists, got none")
        if (got := sha256(path / name)) != digest:
            raise ValueError(f"{path / name}: Expected SHA-256 {digest}, got {got}")


def write_arrays(directory: Path, arrays: Mapping[str, Any], shard_bytes: int) -> dict[str, str]:
    """Write arrays to one or more safetensors files; they come to the host one file at a time.

    Args:
      directory: where to write them.
      arrays: the arrays by name, on any device.
      shard_bytes: size that a file may have (a larger array has a file of its own).

    Returns:
      The name of the file that each array is in.

    Raises:
      OSError: they can't be written.
    """
    shards = _shards(arrays, shard_bytes)
    files: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _save_arrays({name: np.asarray(arrays[name], order="C") for name in names}, directory / file)
        files |= dict.fromkeys(names, file)
    return files


def write_manifest(directory: Path) -> None:
    """Write the SHA-256 of every file that is there."""
    sums = [f"{sha256(file)}  {file.name}\n" for file in sorted(directory.iterdir())]
    (directory / MANIFEST).write_text("".join(sums), encoding="utf-8")


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
        raise OSError(f"{file.name}: {e}") from e


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object as indented UTF-8."""
    file.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256(file: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Wait until the disk holds a file's content, or the names in a directory."""
    if path.is_dir() and os.name == "nt":  # Windows can't open directories
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
