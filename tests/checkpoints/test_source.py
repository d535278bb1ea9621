"""Files that others change while they are read."""

import os
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from checkpoint_files import write_directory
from tiny_model import make_llama_directory

import jint8
from jint8.checkpoints import open_checkpoint
from jint8.checkpoints._safetensors import read_arrays
from jint8.checkpoints._source import SourceFile

FILE = "model.safetensors"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 40)
    return path


def later(path):
    """The time of change is later, even where the file system counts in coarse steps."""
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)
    later(path)


def append(path):
    with path.open("ab") as f:
        f.write(b"\0")


def overwrite(path):
    with path.open("r+b") as f:
        f.seek(-8, os.SEEK_END)
        f.write(bytes(8))
    later(path)


def replace(path):
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)


CHANGES = {
    "truncated": (truncate, "Expected the file to stay as it is while it is read, got .* bytes instead of"),
    "longer": (append, "got .* bytes instead of"),
    "overwritten": (overwrite, "got a change of its content"),
    "replaced": (replace, "got another file of that name"),
    "removed": (lambda path: path.unlink(), "got none any more"),
}


@pytest.mark.parametrize("begin", [0, 5, 8192])
def test_bytes(begin, file):
    got = SourceFile(file).read(begin, 1500)
    assert got.tobytes() == file.read_bytes()[begin : begin + 1500]
    assert got.ctypes.data % 64 == 0


def test_in_parts(file, monkeypatch):
    """As the system gives fewer bytes than it was asked for: of large files it always does."""
    monkeypatch.setattr("jint8.checkpoints._source.MOST", 7)
    assert SourceFile(file).read(3, 100).tobytes() == file.read_bytes()[3:103]


def test_without_preadv(file, monkeypatch):
    monkeypatch.delattr(os, "preadv", raising=False)
    assert SourceFile(file).read(3, 100).tobytes() == file.read_bytes()[3:103]


def test_reading_ahead(tmp_path, monkeypatch):
    """Of the first bytes of all files; advice that the system doesn't take is no error."""
    asked = []

    def advise(descriptor, begin, nbytes, advice):
        asked.append((begin, nbytes))
        raise OSError

    monkeypatch.setattr(os, "posix_fadvise", advise, raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
    files = {f"{i}.safetensors": {f"w{i}": np.ones(100, np.float32)} for i in range(3)}
    write_directory(tmp_path, files, index=False)
    size = (tmp_path / "0.safetensors").stat().st_size
    monkeypatch.setattr("jint8.checkpoints._checkpoint.READ_AHEAD", size + 10)
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.read_ahead()
        assert asked == [(0, size), (0, 10)]
        monkeypatch.delattr(os, "posix_fadvise")
        checkpoint.read_ahead()


def test_too_short(file):
    with pytest.raises(OSError, match=r"file: tensor 'w': Expected 100 bytes from byte 10200 on, got 40: .* shorter"):
        SourceFile(file).read(10200, 100, "tensor 'w'")


def test_errors_of_the_system_name_the_file(tmp_path):
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        SourceFile(tmp_path).read(0, 1)


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_changes(change, message, file):
    source = SourceFile(file)
    source.check_unchanged()
    change(file)
    with pytest.raises(OSError, match=f"file.*{message}|{message}.*file"):
        source.check_unchanged()


@pytest.mark.parametrize("error", [None, ValueError, KeyError], ids=["no_error", "ValueError", "KeyError"])
@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_checkpoint_says_so_at_its_end(change, message, error, tmp_path):
    """A change explains values that can't be used, but not an error of another kind."""
    write_directory(tmp_path, {FILE: {"w": np.ones((4, 4), np.float32)}})
    expected = (KeyError, "other") if error is KeyError else (OSError, message)

    def use():
        with open_checkpoint(tmp_path):
            change(tmp_path / FILE)
            if error is not None:
                raise error("other")

    with pytest.raises(expected[0], match=expected[1]):
        use()


def test_adapters(tmp_path):
    write_directory(tmp_path, {FILE: {"a": np.ones(4, np.float32), "b": np.ones(4, np.float32)}})
    arrays = read_arrays(tmp_path / FILE)
    next(arrays)
    overwrite(tmp_path / FILE)
    with pytest.raises(OSError, match="a change of its content"):
        list(arrays)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_llama_directory(tmp_path_factory.mktemp("source") / "llama", seed=2)


@pytest.mark.parametrize("saved", [True, False], ids=["saved", "huggingface"])
@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_load(change, message, saved, source, tmp_path):
    path = tmp_path / "model"
    if saved:
        jint8.save(path, jint8.load(source))
    else:
        make_llama_directory(path, seed=2)
    lock, changed = threading.Lock(), []

    def progress(done, total):
        with lock:
            if not changed:
                changed.append(True)
                change(path / FILE)

    with pytest.raises(OSError, match=rf"{message}|tensor '.*': Expected .* bytes from byte .* got .* shorter"):
        jint8.load(path, progress=progress)


@pytest.mark.parametrize("saved", [True, False], ids=["saved", "huggingface"])
def test_nothing_refers_to_the_file_afterwards(saved, source, tmp_path):
    path = tmp_path / "model"
    if saved:
        jint8.save(path, jint8.load(source))
    else:
        make_llama_directory(path, seed=2)
    model = jint8.load(path)
    before = [np.array(x) for x in jax.tree.leaves(model.params)]
    (path / FILE).write_bytes(bytes((path / FILE).stat().st_size))
    for x, y in zip(jax.tree.leaves(model.params), before, strict=True):
        np.testing.assert_array_equal(x, y)


SHRINKS = """
import os, sys
import jint8
def progress(done, total):
    os.truncate(sys.argv[1], 4096)
jint8.load(os.path.dirname(sys.argv[1]), progress=progress)
"""


def test_a_process_survives_a_file_that_shrinks(source, tmp_path):
    """A mapped file would end it with SIGBUS."""
    jint8.save(tmp_path / "model", jint8.load(source))
    argv = [sys.executable, "-c", SHRINKS, tmp_path / "model" / FILE]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "became shorter while it was read" in done.stderr
