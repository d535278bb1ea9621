"""Where a directory may be written, and what is there before, meanwhile and afterwards."""

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from jint8.checkpoints import _destination, _partial, open_checkpoint
from jint8.checkpoints._destination import Destination, check_complete, check_destination
from jint8.checkpoints._directory import write_manifest, write_text

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no flock")
FILES = {"a.json": "1", "b.json": "22"}
ALL = [*sorted([*FILES, "SHA256SUMS"])]


def fill(destination):
    for name, text in FILES.items():
        write_text(destination, name, text)
    write_manifest(destination)


def write(path, say=None):
    with Destination(path, say) as destination:
        fill(destination)
        destination.complete()


def names(path):
    return sorted(file.name for file in path.iterdir())


def check(path):
    assert names(path) == ALL
    assert {name: (path / name).read_text() for name in FILES} == FILES
    check_complete(path)
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=path, check=False).returncode == 0


def refuse(number, what=lambda source, target: True):
    """`Path.replace` as a file system has it that refuses some renames."""
    replace = Path.replace

    def refusing(self, target):
        if what(self, target):
            raise OSError(number, os.strerror(number), str(self))
        return replace(self, target)

    return refusing


def test_nothing_there(tmp_path):
    write(tmp_path / "new" / "parents" / "out")
    check(tmp_path / "new" / "parents" / "out")
    assert names(tmp_path / "new" / "parents") == ["out"]


def test_appears_at_once(tmp_path):
    with Destination(tmp_path / "out") as destination:
        fill(destination)
        assert not (tmp_path / "out").exists()
        destination.complete()
        check(tmp_path / "out")


@pytest.mark.parametrize("path", [".", "{absolute}", "../{name}"])
def test_current_directory(path, tmp_path, monkeypatch):
    """It stays the one in which the shell is, which a rename would leave in a directory that is gone."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    inode = here.stat().st_ino
    write(Path(path.format(absolute=here, name="here")))
    check(here)
    assert here.stat().st_ino == inode
    assert names(tmp_path) == ["here"]


def test_link_to_an_empty_directory(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link")
    check(tmp_path / "real")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path) == ["link", "real"]


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV, errno.EACCES], ids=errno.errorcode.get)
def test_mount_point(known, number, tmp_path, monkeypatch):
    """The system refuses to rename something over it; what lies beside it is on another file system."""
    out = tmp_path / "out"
    out.mkdir()
    inode = out.stat().st_ino
    monkeypatch.setattr(_destination, "_is_mount_point", lambda path: known)
    monkeypatch.setattr(Path, "replace", refuse(number, lambda source, target: Path(target) == out))
    with Destination(out) as destination:
        assert destination.directory.parent == (out if known else tmp_path)
        fill(destination)
        destination.complete()
    check(out)
    assert out.stat().st_ino == inode
    assert names(tmp_path) == ["out"]


def test_which_directories_are_mount_points(tmp_path):
    assert not _destination._is_mount_point(tmp_path)
    if sys.platform == "linux":
        assert _destination._is_mount_point(Path("/proc"))


def test_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    """An empty directory in it, which can, is filled; another one can't be made."""
    (tmp_path / "out").mkdir()
    make = _partial.tempfile.mkdtemp

    def refusing(*, dir, **options):
        if Path(dir) == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied", f"{dir}/.hidden")
        return make(dir=dir, **options)

    monkeypatch.setattr(_partial.tempfile, "mkdtemp", refusing)
    write(tmp_path / "out")
    check(tmp_path / "out")
    with pytest.raises(PermissionError, match=r"Permission denied: '.*/other'"):
        Destination(tmp_path / "other")
    assert names(tmp_path) == ["out"]


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("exists", [True, False])
def test_read_only_folder(exists, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    out = folder if exists else folder / "out"
    folder.chmod(0o500)
    with pytest.raises(PermissionError, match=f"Permission denied: '{out}'"):
        Destination(out)
    folder.chmod(0o700)
    assert names(folder) == []


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"Not a directory: '.*/file/new/out'"):
        Destination(tmp_path / "file" / "new" / "out")
    with pytest.raises(FileExistsError, match="file: Expected nothing or an empty directory there, got a file"):
        Destination(tmp_path / "file")
    assert names(tmp_path) == ["file"]


def test_something_in_the_directory(tmp_path):
    (tmp_path / "mine").touch()
    for look in (Destination, check_destination):
        with pytest.raises(FileExistsError, match="got something: 'mine' is in it"):
            look(tmp_path)
    assert names(tmp_path) == ["mine"]


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "beside"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_nothing_remains_of_an_error(error, inside, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(_destination, "_is_mount_point", lambda path: inside)
    with contextlib.suppress(error), Destination(tmp_path / "out") as destination:
        fill(destination)
        raise error
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == []
    with contextlib.suppress(error), Destination(tmp_path / "new" / "out") as destination:
        raise error
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_nothing_remains_of_an_error_while_files_are_moved(known, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(_destination, "_is_mount_point", lambda path: known)
    monkeypatch.setattr(
        Path, "replace", refuse(errno.ENOSPC, lambda source, target: source.name == "SHA256SUMS" or target == out)
    )
    with pytest.raises(OSError, match="No space left"):
        write(out)
    assert names(out) == []
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "beside"])
def test_second_writer(inside, tmp_path, monkeypatch):
    """It is refused while the first is at work, and when that has finished."""
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(_destination, "_is_mount_point", lambda path: inside)
    with Destination(out) as destination:
        fill(destination)
        with pytest.raises(FileExistsError, match=r"out: Expected to be the only writer, got another one at work in"):
            Destination(out)
        write(tmp_path / "other")  # which is none of its business
        destination.complete()
    with pytest.raises(FileExistsError, match="Expected nothing or an empty directory"):
        Destination(out)
    check(out)


@pytest.mark.parametrize("there", [True, False], ids=["empty_directory", "nothing"])
def test_the_slower_writer_says_so(there, tmp_path, monkeypatch):
    """On a file system without locks, nobody knows before the end."""
    monkeypatch.setattr(_partial, "fcntl", None)
    out = tmp_path / "out"
    if there:
        out.mkdir()
    said = []
    with Destination(out) as slow:
        fill(slow)
        write_text(slow, "a.json", "other")
        write(out, said.append)
        assert re.fullmatch(r"left .*\.out\..*\.partial alone, which may be .*", said[0])
        with pytest.raises(FileExistsError, match="out: Expected nothing or an empty directory there, got something"):
            slow.complete()
    check(out)
    assert names(tmp_path) == ["out"]


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.append(sys.argv[1])
from test_destination import Destination, _destination, fill
if sys.argv[3] != "beside":
    _destination._is_mount_point = lambda path: True
destination = Destination(Path(sys.argv[2]))
fill(destination)
if sys.argv[3] == "moving":
    Path.replace = lambda self, target: os.kill(os.getpid(), signal.SIGKILL)
    destination.complete()
if sys.argv[3] == "moved":
    _destination.Partial.discard = lambda self: os.kill(os.getpid(), signal.SIGKILL)
    destination.complete()
os.kill(os.getpid(), signal.SIGKILL)
"""


def kill(path, when):
    argv = [sys.executable, "-c", KILLED, Path(__file__).parent, path, when]
    assert subprocess.run(argv, check=False, timeout=60).returncode == -signal.SIGKILL


@pytest.mark.first_case
@pytest.mark.parametrize("when", ["beside", "inside", "moving"])
def test_what_a_killed_run_left_is_removed(when, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    kill(out, when)
    folder = tmp_path if when == "beside" else out
    (left,) = [name for name in names(folder) if name.endswith(".partial")]
    if when == "moving":
        assert set(FILES) < set(names(out))
        with pytest.raises(ValueError, match="out: Expected a directory that was written to its end"):
            open_checkpoint(out)
    said = []
    write(out, said.append)
    assert len(said) == 1
    assert re.fullmatch(rf"removed .*/{re.escape(left)} \(\d+\.\d MB\), which an interrupted run had left", said[0])
    check(out)
    assert names(tmp_path) == ["out"]


def test_killed_when_all_was_moved(tmp_path):
    """It is complete, and stays so."""
    (tmp_path / "out").mkdir()
    kill(tmp_path / "out", "moved")
    assert set(ALL) < set(names(tmp_path / "out"))
    check_complete(tmp_path / "out")
    with pytest.raises(FileExistsError, match="got something"):
        Destination(tmp_path / "out", say=print)
    check(tmp_path / "out")


def test_what_was_moved_is_removed_only_where_it_is_the_same(tmp_path):
    (tmp_path / "out").mkdir()
    kill(tmp_path / "out", "moving")
    (tmp_path / "out" / "a.json").write_text("mine")
    with pytest.raises(FileExistsError, match=r"'a\.json' is in it"):
        Destination(tmp_path / "out", say=print)
    assert names(tmp_path / "out") == ["a.json"]


def test_left_by_runs_for_other_destinations(tmp_path):
    """They are removed, too; what isn't ours isn't."""
    kill(tmp_path / "other", "beside")
    (tmp_path / ".other.partial").mkdir()
    (tmp_path / ".file.0123abcd-01234567.partial").touch()
    write(tmp_path / "out", lambda text: None)
    assert names(tmp_path) == [".file.0123abcd-01234567.partial", ".other.partial", "out"]


@pytest.mark.parametrize("left", [".out.0123abcd-01234567.partial", ".out.abcd_123.partial"], ids=["host", "0.1.0"])
def test_what_nobody_can_tell_about_is_named(left, tmp_path):
    """It may be a writer's on another host, whose lock isn't seen here; or one of jint8 0.1.0, which held none."""
    (tmp_path / left).mkdir()
    with pytest.warns(UserWarning, match=rf"left .*/{re.escape(left)} alone"):
        write(tmp_path / "out")
    assert names(tmp_path) == [left, "out"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(tmp_path / "else")  # it isn't named to those whom it doesn't concern


def test_space(tmp_path):
    message = r"Expected 1,000,000,000,000,000\.0 MB of free space, got .*: '.*/out'"
    with Destination(tmp_path / "out") as destination, pytest.raises(OSError, match=message):
        destination.check_space(10**21)
    assert names(tmp_path) == []


def test_names_of_files_in_errors(tmp_path):
    """Of where they are going to be, not of the hidden directory."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    message = r"No space left on device: '.*/out/a\.json'"
    with (
        Destination(tmp_path / "out") as destination,
        pytest.raises(OSError, match=message),
        destination.naming("a.json"),
    ):
        raise full
