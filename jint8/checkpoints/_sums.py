"""Sums: the manifest of a directory, files that are compared with it, checksums of arrays."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

MANIFEST = "SHA256SUMS"  # in the format of the command sha256sum, which can check a directory without jint8
WORKERS = 4  # files whose sums are computed at the same time
PAGE = 4096  # bytes that `checksum` adds up


def read_manifest(path: Path) -> dict[str, str]:
    """The sums of a directory, by file name.

    Raises:
      FileNotFoundError: it has none.
      ValueError: the file isn't a list of sums.
    """
    manifest = path / MANIFEST
    if not manifest.exists():
        what = "directory" if path.is_dir() else "file"
        raise FileNotFoundError(
            f"{manifest}: Expected this file, which jint8.save writes, to compare sums with, got a {what} without"
        )
    sums = {}
    for line in manifest.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        if Path(name).name != name or not name:
            raise ValueError(f"{manifest}: Expected lines of a SHA-256 and a file name, got {line!r}")
        sums[name] = digest
    return sums


def verify_files(path: Path) -> None:
    """Compare every file of a directory with the manifest.

    Args:
      path: what `jint8.save` wrote.

    Raises:
      FileNotFoundError: the manifest, or a file that it lists, is missing.
      ValueError: a file differs, or isn't in the manifest.
    """
    sums = read_manifest(path)
    for file in sorted(path.iterdir()):
        # a file that jint8.load would read without its sum having been compared
        if file.suffix in (".safetensors", ".json", ".jinja") and file.name not in sums:
            raise ValueError(f"{file}: Expected only files that {MANIFEST} lists, got this")
    for name in sums:
        if not (path / name).exists():
            raise FileNotFoundError(f"{path / name}: Expected this file, which {MANIFEST} lists, got none")
    with ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1)) as workers:  # hashlib works without Python's lock
        for name, got in zip(sums, workers.map(sha256, [path / name for name in sums]), strict=True):
            if got != sums[name]:
                raise ValueError(f"{path / name}: Expected SHA-256 {sums[name]}, got {got}")


def sha256(file: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def checksum(array: np.ndarray) -> str:
    """A checksum of an array's bytes, 16 hexadecimal digits, at the speed of reading memory.

    It is the SHA-256 of the sums of each page's words, modulo 2^64. It sees pages that were lost or exchanged and words
    that were changed, as hardware and copies do; whoever means to can deceive it.
    """
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    whole = raw.size // PAGE * PAGE
    sums = raw[:whole].view("<u8").reshape(-1, PAGE // 8).sum(axis=1, dtype="<u8")
    digest = hashlib.sha256(sums.tobytes())
    digest.update(raw[whole:].tobytes())
    return digest.hexdigest()[:16]
