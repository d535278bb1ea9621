"""A file that is read in parts while others may change it.

Files aren't mapped into memory: one that becomes shorter would end the process (SIGBUS) instead of raising an error,
and what others write later would change values that were read. Reading into memory that JAX takes over costs no more.
"""

import contextlib
import errno
import os
import threading
import weakref
from pathlib import Path
from typing import NamedTuple

import numpy as np

MOST = 1 << 30  # bytes of one call: Linux reads at most 2 GiB, macOS refuses more
ALIGNMENT = 64  # of memory that `jax.device_put` takes over on a CPU without a copy


class _State(NamedTuple):
    """What changes when a file is replaced or written to."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> "_State":
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


class SourceFile:
    """An open file. It is closed with the last reference: a thread may be reading when its owner gives up.

    Attributes:
      path: of the file.
      size: in bytes, when it was opened.
    """

    def __init__(self, path: Path):
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._descriptor)
        self._state = _State.of(os.fstat(self._descriptor))
        self.size = self._state.size
        self._lock = threading.Lock()

    def read(self, begin: int, nbytes: int, what: str = "") -> np.ndarray:
        """Bytes of the file.

        Args:
          begin: offset of the first one.
          nbytes: how many.
          what: they are, for messages.

        Returns:
          A uint8 array of its own, which begins at a multiple of 64 bytes.

        Raises:
          OSError: they can't be read, or the file has become too short.
        """
        memory = np.empty(nbytes + ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % ALIGNMENT
        out = memory[start : start + nbytes]
        if (got := self.read_into(out, begin)) < nbytes:
            where = f"{self.path}: {what}: " if what else f"{self.path}: "
            raise OSError(
                f"{where}Expected {nbytes} bytes from byte {begin} on, got {got}: the file became shorter while it was "
                "read"
            )
        return out

    def read_into(self, out: np.ndarray, begin: int) -> int:
        """Fill a uint8 array from byte `begin` on; returns how many bytes there were."""
        view, done = out.data, 0
        while done < len(view):
            try:
                got = self._read_some(view[done : done + MOST], begin + done)
            except OSError as e:
                raise OSError(e.errno, e.strerror, str(self.path)) from e
            if not got:
                break
            done += got
        return done

    def read_ahead(self, nbytes: int) -> None:
        """Have the system read so many bytes into its cache, while this process does something else."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # it is only advice
                os.posix_fadvise(self._descriptor, 0, nbytes, os.POSIX_FADV_WILLNEED)

    def check_unchanged(self) -> None:
        """Raise OSError if the file was written to or replaced since it was opened, or there is none any more."""
        try:
            now = _State.of(os.stat(self.path))
        except FileNotFoundError:
            raise FileNotFoundError(
                errno.ENOENT, "Expected the file to stay while it is read, got none any more", str(self.path)
            ) from None
        if now != self._state:
            if (now.device, now.inode) != (self._state.device, self._state.inode):
                got = "another file of that name"
            elif now.size != self.size:
                got = f"{now.size} bytes instead of {self.size}"
            else:
                got = "a change of its content"
            raise OSError(f"{self.path}: Expected the file to stay as it is while it is read, got {got}")

    def _read_some(self, view: memoryview, begin: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [view], begin)
        with self._lock:  # Windows has one position for all threads
            os.lseek(self._descriptor, begin, os.SEEK_SET)
            data = os.read(self._descriptor, len(view))
        view[: len(data)] = data
        return len(data)
