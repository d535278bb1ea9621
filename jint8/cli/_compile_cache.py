"""Compiled programs on disk, for the next run: JAX's persistent compilation cache with files that heal.

JAX writes a program into its file and never looks whether it is all there: one that a full disk or the end of the
process cut stays, and each later run fails to read it, warns and compiles again. Here a file appears complete or not at
all, begins with a checksum, and is replaced where it doesn't fit. So several processes can share a directory. What was
used least recently goes when there is too much.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from jint8.cli import _waiting

MOST_BYTES = 512 * 2**20  # programs of a model take some MB
SUFFIX, PART = ".program", ".partial"
OURS = (SUFFIX, PART, "-cache", "-atime")  # the latter are those of JAX, as earlier versions had them written
ABANDONED = 600.0  # seconds after which nobody is writing a file any more
DIGEST = hashlib.blake2b().digest_size


def cache_directory() -> Path:
    """`$JINT8_CACHE`, else `$XDG_CACHE_HOME/jint8`, else `~/.cache/jint8`.

    Raises:
      FileNotFoundError: the user has no home directory, and the environment names no other place.
    """
    if own := os.environ.get("JINT8_CACHE"):
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "jint8")
    except RuntimeError:
        raise FileNotFoundError("Expected $JINT8_CACHE or a home directory, got neither") from None


def use_compile_cache(args: argparse.Namespace) -> None:
    """Have JAX keep compiled programs in the cache, unless `--no-compile-cache` says no or JAX has a place already."""
    import jax

    kept = not args.no_compile_cache and _use(args)
    if kept:
        # JAX's default leaves programs out that compile in less than 1 s, but many of these add up.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    more = {_waiting.COMPILING: " (kept for the next run)"} if kept else {}
    _waiting.compilation().say = lambda what: _waiting.say(args, what + more.get(what, ""))


def _use(args: argparse.Namespace) -> bool:
    """Whether programs are kept."""
    import jax

    if getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        return True
    try:
        directory = cache_directory() / "compiled"
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _waiting.say(args, f"compiled programs are not kept: {error}")
        return False
    # JAX has no public way to a cache of one's own. Without this one its plain files are used.
    with contextlib.suppress(ImportError):
        from jax._src import compilation_cache

        if hasattr(compilation_cache, "get_file_cache"):
            make: Any = lambda path: (_file_cache(Path(path), functools.partial(_waiting.say, args)), path)
            compilation_cache.get_file_cache = make
    jax.config.update("jax_compilation_cache_dir", str(directory))
    return True


def _file_cache(path: Path, complain: Callable[[str], None]) -> Any:
    from jax._src.compilation_cache_interface import CacheInterface

    class FileCache(Programs, CacheInterface):
        """`Programs` as JAX takes them."""

    return FileCache(path, complain, _waiting.compilation().found)


class Programs:
    """Values of bytes by key, in a directory.

    Args:
      path: the directory.
      complain: called with a text, once, when something can't be written.
      found: called when a value was found, before it is returned.
      most_bytes: how much is kept, at most.
    """

    def __init__(
        self,
        path: Path,
        complain: Callable[[str], None],
        found: Callable[[], None] = lambda: None,
        most_bytes: int = MOST_BYTES,
    ):
        self._path = path  # which JAX reads
        self._found = found
        self._complain = complain
        self._most_bytes = most_bytes
        self._writable = True

    def get(self, key: str) -> bytes | None:
        """The value; None where there is none, or it isn't complete."""
        file = self._path / (key + SUFFIX)
        try:
            content = file.read_bytes()
        except OSError:
            return None
        if _digest(content[DIGEST:]) != content[:DIGEST]:
            return None  # `put` replaces it
        with contextlib.suppress(OSError):  # a cache that is only read
            os.utime(file)  # it was used now
        self._found()
        return content[DIGEST:]

    def put(self, key: str, value: bytes) -> None:
        """Keep a value. What can't be kept is not, and that is said once."""
        if not self._writable:
            return
        try:
            with _complete_file(self._path / (key + SUFFIX)) as file:
                file.write(_digest(value) + value)
            self._prune()
        except OSError as error:
            self._writable = False
            self._complain(f"compiled programs are not kept: {self._path}: {error.strerror or error}")

    def _prune(self) -> None:
        """Remove what was used least recently until the rest fits, and what killed processes left."""
        files = []
        for entry in os.scandir(self._path):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                if entry.name.endswith(OURS) and entry.is_file(follow_symlinks=False):
                    found = entry.stat(follow_symlinks=False)
                    files.append((found.st_mtime, found.st_size, entry))
        total = sum(size for _, size, _ in files)
        for used, size, entry in sorted(files, key=lambda file: file[0]):
            written = entry.name.endswith(PART)  # maybe right now, by another process
            if time.time() - used > ABANDONED if written else total > self._most_bytes:
                Path(entry.path).unlink(missing_ok=True)
                total -= size


@contextlib.contextmanager
def _complete_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that has its name when the block is done, and is gone when it fails."""
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=PART, delete=False) as file:
        try:
            yield file
            file.close()  # which may find the disk full
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _digest(value: bytes) -> bytes:
    return hashlib.blake2b(value).digest()
