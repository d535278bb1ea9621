"""Hidden directories in which something is written until it is complete, and what killed runs left of theirs.

A writer holds a lock (`flock`) on its partial directory: the system releases it when the process ends, however it ends.
Who gets the lock knows that the writer is gone. A lock may be blind to other hosts, so that the name of the directory
has the boot of its writer, too: what comes from another one is left alone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and what killed runs left is never removed
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".partial"
PATTERN = re.compile(r"\.(?P<name>.*)\.(?:(?P<boot>[0-9a-f]{8})-)?[0-9a-z_]{8}\.partial", re.DOTALL)
PATIENCE = 1.0  # seconds that other writers have to begin or to look around


class Leftovers(NamedTuple):
    """Partial directories that were in a folder.

    Attributes:
      removed: with their sizes in bytes, as their writers are gone.
      unknown: of which nobody can tell; they are still there.
    """

    removed: list[tuple[Path, int]]
    unknown: list[Path]


class Partial:
    """A partial directory of this process.

    Attributes:
      path: of it.
      leftovers: that were found beside it.
    """

    def __init__(self, folder: Path, name: str):
        """Makes it.

        Args:
          folder: to make it in.
          name: of what is to be written in the folder; empty where the folder itself is to be filled.

        Raises:
          FileExistsError: another writer is at work on the same.
          OSError: it can't be made.
        """
        # One writer at a time looks around and begins, so that of two that begin at once one sees the other.
        with _locked_for_a_moment(folder):
            self.leftovers = _clear(folder, name)
            self.path = Path(tempfile.mkdtemp(prefix=f".{name}.{boot()}-", suffix=SUFFIX, dir=folder))
            self._lock = _lock(self.path)

    def release(self) -> None:
        """Give up the lock, when there is nothing left to protect."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def discard(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()


def clear(folder: Path, name: str, undo: Callable[[Path], None] | None = None) -> Leftovers:
    """Remove what killed runs left in a folder.

    Args:
      folder: to look in.
      name: of what is to be written there, as for `Partial`.
      undo: called with a partial directory of that name before it is removed.

    Returns:
      What was found. Directories of other names that nobody can tell about are left out.

    Raises:
      FileExistsError: a writer is at work on something of that name.
    """
    with _locked_for_a_moment(folder):
        return _clear(folder, name, undo)


def _clear(folder: Path, name: str, undo: Callable[[Path], None] | None = None) -> Leftovers:
    found = Leftovers([], [])
    for path in partials(folder):
        match = PATTERN.fullmatch(path.name)
        same = match is not None and match["name"] == name
        lock = None
        try:
            # One of another boot is of another host, or from before this one was started: the lock may be blind.
            if match is not None and match["boot"] == boot():
                lock = _lock(path)
        except BlockingIOError:  # at work
            if same:
                raise FileExistsError(
                    f"{folder / name}: Expected to be the only writer, got another one at work in {path}"
                ) from None
            continue
        if lock is None:
            if same:
                found.unknown.append(path)
            continue
        try:
            if same and undo is not None:
                undo(path)
            size = sum(file.lstat().st_size for file in path.iterdir())
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)
        found.removed.append((path, size))
    return found


def partials(folder: Path) -> list[Path]:
    """The partial directories in a folder; none in one that can't be read."""
    try:
        return sorted(path for path in folder.iterdir() if is_partial(path))
    except OSError:
        return []


def is_partial(path: Path) -> bool:
    """Whether this is a partial directory, by its name."""
    return PATTERN.fullmatch(path.name) is not None and path.is_dir() and not path.is_symlink()


def boot() -> str:
    """Eight digits that differ between hosts, and from one start of a host to the next; containers share them."""
    try:
        identity = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        identity = platform.node()
    return hashlib.sha256(identity.encode()).hexdigest()[:8]


def _lock(directory: Path) -> int | None:
    """A descriptor that holds a directory's lock until it is closed. None where there are no locks, or no permission.

    Raises:
      BlockingIOError: another process holds it.
    """
    if fcntl is None:
        return None
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        os.close(descriptor)
        if e.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise BlockingIOError(e.errno, e.strerror) from None
        return None  # a network's file system
    return descriptor


@contextlib.contextmanager
def _locked_for_a_moment(folder: Path) -> Iterator[None]:
    """Holds a folder's lock. Goes on without it where it can't be had: others use it for purposes of their own."""
    lock, end = None, time.monotonic() + PATIENCE
    while True:
        try:
            lock = _lock(folder)
            break
        except BlockingIOError:
            if time.monotonic() > end:
                break
            time.sleep(0.02)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)
