"""Where a new directory is going to be written."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Self

from jint8.checkpoints import _directory
from jint8.checkpoints._partial import Leftovers, Partial, clear, partials
from jint8.checkpoints._sums import MANIFEST, read_manifest, sha256

INSIDE = ""  # the name of partial directories that lie in the directory that they are for


class Destination:
    """A directory that is going to be written. What speaks against it is said before there is anything to write.

    The files are written in a hidden directory. Where there is nothing at `path`, or an empty directory that can be
    replaced, it lies beside `path` and is renamed: `path` appears complete or not at all. The current directory, a
    mount point and a directory in a folder that can't be written to stay what they are: the hidden directory lies
    inside, and its files are moved out of it, the manifest last.

    Used in a `with` statement, at whose end nothing remains unless `complete` was called.

    Attributes:
      path: as it was given.
      directory: the hidden one, to fill.
    """

    def __init__(self, path: Path, say: Callable[[str], None] | None = None):
        """Checks the place and makes the hidden directory.

        Args:
          path: nothing, or an empty directory, or a link to one.
          say: called with what is to be said of what killed runs have left; None warns.

        Raises:
          FileExistsError: there is something at `path`, or another writer at work.
          OSError: nothing can be written there.
        """
        self.path = path
        # An absolute path, also where it is given as ".", or as a link to the directory that is going to be filled.
        self._target = Path(os.path.realpath(path))
        self._parents: list[Path] = []  # that were made for it, from the innermost
        self._partial: Partial | None = None
        self._found = Leftovers([], [])
        try:
            self._partial = self._begin()
            _report(self._found, say or _warn)
        except BaseException:
            self._discard()
            raise
        self.directory = self._partial.path

    def _begin(self) -> Partial:
        target = self._target
        exists = target.is_dir()
        if exists:
            self._find(clear(target, INSIDE, undo=_remove_moved))
        _check_vacant(self.path)
        keeps = exists and (_is_mount_point(target) or _is_current(target) or not os.access(target, os.W_OK | os.X_OK))
        try:
            if not keeps:
                try:
                    self._make_parents()
                    return self._partial_in(target.parent, target.name)
                except FileExistsError:
                    raise
                except OSError:
                    if not exists:
                        raise
            return self._partial_in(target, INSIDE)
        except OSError as error:
            # The messages of our own have no number, and name it.
            raise error if error.errno is None else _with_name(error, self.path) from error

    def _partial_in(self, folder: Path, name: str) -> Partial:
        partial = Partial(folder, name)
        self._find(partial.leftovers)
        return partial

    def _find(self, found: Leftovers) -> None:
        self._found.removed.extend(found.removed)
        self._found.unknown.extend(found.unknown)

    def _make_parents(self) -> None:
        missing, parent = [], self._target.parent
        while not parent.exists():
            missing.append(parent)
            parent = parent.parent
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)  # another writer may have made it meanwhile
            self._parents.insert(0, folder)

    def check_space(self, nbytes: int) -> None:
        """Raise OSError if there aren't so many free bytes."""
        free = shutil.disk_usage(self.directory).free
        if free < nbytes:
            text = f"Expected {nbytes / 1e6:,.1f} MB of free space, got {free / 1e6:,.1f} MB"
            raise OSError(errno.ENOSPC, text, str(self.path))

    @contextlib.contextmanager
    def naming(self, file: str) -> Iterator[None]:
        """Names a file, as if it were in `path` already, in an OSError."""
        try:
            yield
        except OSError as error:
            raise _with_name(error, self.path / file) from error

    def complete(self) -> None:
        """Move what was written to where it belongs.

        Raises:
          FileExistsError: something has come there meanwhile.
          OSError: the disk can't hold it.
        """
        assert self._partial is not None
        umask = os.umask(0)  # the only way to read it is to set it
        os.umask(umask)
        for file in [*self.directory.iterdir(), self.directory]:
            # mkdtemp and safetensors let only the owner read what they make; give it the user's usual permissions
            file.chmod((0o777 if file.is_dir() else 0o666) & ~umask)
            with self.naming("" if file.is_dir() else file.name):
                # Content is on the disk before the name is: a power failure leaves the old state or the whole.
                _directory._sync(file)
        if self.directory.parent == self._target:
            self._move_inside(self._partial)
            return
        try:
            self.directory.replace(self._target)
        except OSError as error:
            _check_vacant(self.path)  # another writer may have been faster
            if not self._target.is_dir():
                raise _with_name(error, self.path) from error
            # A mount point that doesn't look like one, or a directory that only its owner may replace.
            self._move_inside(Partial(self._target, INSIDE))
            self._partial.discard()
            return
        self._partial.release()
        _directory._sync(self._target.parent)

    def _move_inside(self, marker: Partial) -> None:
        """Moves the files into the existing directory. Until the manifest is there, `marker` says that some may lack.

        The manifest lies in `marker` meanwhile: from it the next run knows what one that was killed has moved.
        """
        _check_vacant(self.path, but=[marker.path])
        names = sorted({file.name for file in self.directory.iterdir()} - {MANIFEST})
        moved: list[Path] = []
        try:
            for to in [marker.path / MANIFEST, *(self._target / name for name in names)]:
                if to.parent != self.directory:
                    moved.append(to)
                    with self.naming(to.name):
                        shutil.move(self.directory / to.name, to)  # which copies to another file system
                        _directory._sync(to)
            _directory._sync(self._target)
            (marker.path / MANIFEST).replace(self._target / MANIFEST)
        except BaseException:
            if not (self._target / MANIFEST).exists():  # it may be there already, and then this isn't undone
                for file in moved:
                    file.unlink(missing_ok=True)
            marker.discard()
            raise
        marker.discard()
        _directory._sync(self._target)

    def _discard(self) -> None:
        if self._partial is not None:
            self._partial.discard()
        with contextlib.suppress(OSError):  # something of others is in there by now
            for folder in self._parents:
                folder.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.directory.exists():
            self._discard()


def check_destination(path: Path) -> None:
    """Raise FileExistsError unless `path` is nothing or an empty directory, as far as one can tell by looking."""
    _check_vacant(path, but=_markers(path))


def check_complete(path: Path) -> None:
    """Raise ValueError for a directory into which files are being moved, or were when the run was killed."""
    if (markers := _markers(path)) and not (path / MANIFEST).exists():
        raise ValueError(
            f"{path}: Expected a directory that was written to its end, got one that a run is at work on or was "
            f"interrupted in ({min(markers).name})"
        )


def _check_vacant(path: Path, but: Collection[Path] = ()) -> None:
    """Raises FileExistsError unless `path` is nothing, or a directory that is empty `but` for these."""
    if path.is_dir():
        names = {file.name for file in path.iterdir()} - {file.name for file in but}
        if not names:
            return
        got = f"something: {min(names)!r} is in it"
    elif path.exists():
        got = "a file"
    elif path.is_symlink():
        got = "a link to nothing"
    else:
        return
    raise FileExistsError(f"{path}: Expected nothing or an empty directory there, got {got}")


def _markers(path: Path) -> list[Path]:
    """The partial directories in `path` whose files are for `path` itself."""
    return [left for left in partials(path) if left.name.startswith("..")]


def _remove_moved(marker: Path) -> None:
    """Removes the files that a killed run has moved from `marker` to where they belong, unless it had moved all."""
    target = marker.parent
    if (target / MANIFEST).exists() or not (marker / MANIFEST).exists():
        return
    for name, digest in read_manifest(marker).items():
        file = target / name
        if file.is_file() and sha256(file) == digest:  # it may be another one by now
            file.unlink()


def _with_name(error: OSError, path: Path) -> OSError:
    """The error of a system call, with the name that the user knows."""
    if error.errno is None:
        return OSError(f"{path}: {error}")
    return OSError(error.errno, error.strerror, str(path))


def _is_current(path: Path) -> bool:
    """Whether this is the current directory: who replaced it would leave the shell in one that is gone."""
    try:
        return path.samefile(os.curdir)
    except OSError:
        return False


def _is_mount_point(path: Path) -> bool:
    if path.is_mount():
        return True
    try:  # a directory of the same file system that is mounted a second time, which `is_mount` doesn't see
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return False
    escaped = re.sub(r"[\\\s]", lambda match: f"\\{ord(match[0]):03o}", str(path))
    return any(line.split(" ")[4] == escaped for line in mounts.splitlines())


def _report(found: Leftovers, say: Callable[[str], None]) -> None:
    for left, size in found.removed:
        say(f"removed {left} ({size / 1e6:,.1f} MB), which an interrupted run had left")
    for left in found.unknown:
        say(f"left {left} alone, which may be an interrupted run's: remove it if none is at work on another host")


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)
