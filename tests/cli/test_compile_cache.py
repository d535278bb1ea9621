"""Compiled programs on disk: what is cut is replaced, what can't be kept is said once, what is old goes."""

import argparse
import os
import threading
import time
from pathlib import Path

import jax
import pytest

from jint8.cli import _common, _compile_cache
from jint8.cli._compile_cache import ABANDONED, PART, SUFFIX, Programs

VALUE = os.urandom(1000)


@pytest.fixture
def said():
    return []


@pytest.fixture
def programs(tmp_path, said):
    return Programs(tmp_path, said.append)


def names(path):
    return sorted(file.name for file in path.iterdir())


def test_a_value_comes_back(programs, tmp_path, said):
    assert programs.get("a") is None
    programs.put("a", VALUE)
    assert programs.get("a") == VALUE
    assert (names(tmp_path), said) == (["a" + SUFFIX], [])


FAULTS = {
    "cut": lambda content: content[:-1],
    "cut_in_the_checksum": lambda content: content[:10],
    "empty": lambda content: b"",
    "another_byte": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "zeros": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_damaged_file_is_replaced(fault, programs, tmp_path):
    programs.put("a", VALUE)
    file = tmp_path / ("a" + SUFFIX)
    file.write_bytes(fault(file.read_bytes()))
    assert programs.get("a") is None
    programs.put("a", VALUE)
    assert programs.get("a") == VALUE


def test_what_cannot_be_written_is_said_once(tmp_path, said):
    (tmp_path / "file").touch()
    programs = Programs(tmp_path / "file", said.append)
    for key in "ab":
        programs.put(key, VALUE)
        assert programs.get(key) is None
    assert said == [f"compiled programs are not kept: {tmp_path / 'file'}: Not a directory"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "^C"])
def test_half_a_file_is_removed(error, programs, tmp_path, said, monkeypatch):
    programs.put("a", VALUE)

    def fail(*args):
        raise error

    monkeypatch.setattr(_compile_cache.os, "replace", fail)
    if isinstance(error, OSError):
        programs.put("b", VALUE)
        assert said == [f"compiled programs are not kept: {tmp_path}: No space left on device"]
    else:
        with pytest.raises(KeyboardInterrupt):
            programs.put("b", VALUE)
    assert names(tmp_path) == ["a" + SUFFIX]


def test_what_was_used_least_recently_goes(tmp_path, said):
    programs = Programs(tmp_path, said.append, most_bytes=3 * (len(VALUE) + _compile_cache.DIGEST))
    (tmp_path / "jit_old-0123-cache").write_bytes(VALUE)  # JAX's own
    (tmp_path / "mine.txt").write_bytes(VALUE)
    long_ago = time.time() - 1000
    for age, name in enumerate(("jit_old-0123-cache", "mine.txt")):
        os.utime(tmp_path / name, (long_ago + age,) * 2)
    for age, key in enumerate("abc", start=2):
        programs.put(key, VALUE)
        os.utime(tmp_path / (key + SUFFIX), (long_ago + age,) * 2)
    assert "jit_old-0123-cache" not in names(tmp_path)
    assert programs.get("a") == VALUE
    programs.put("d", VALUE)
    assert names(tmp_path) == [key + SUFFIX for key in "acd"] + ["mine.txt"]
    assert said == []


def test_what_a_killed_process_left_goes(programs, tmp_path):
    for name, age in (("new", 0), ("old", ABANDONED + 9)):
        (tmp_path / (name + PART)).touch()
        os.utime(tmp_path / (name + PART), (time.time() - age,) * 2)
    programs.put("a", VALUE)
    assert names(tmp_path) == ["a" + SUFFIX, "new" + PART]


def test_several_at_once(tmp_path, said):
    """Readers see a whole value or none, while others write and remove."""
    wrong = []

    def work(number):
        programs = Programs(tmp_path, said.append, most_bytes=3000)
        for turn in range(50):
            key = "abc"[(turn + number) % 3]
            programs.put(key, key.encode() * 100_000)
            if (got := programs.get(key)) not in (None, key.encode() * 100_000):
                wrong.append(got)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (wrong, said) == ([], [])


def test_jax_has_the_hook():
    """Programs would be kept without it, too, but files that are cut would stay."""
    from jax._src import compilation_cache
    from jax._src.compilation_cache_interface import CacheInterface

    assert callable(compilation_cache.get_file_cache)
    assert isinstance(_compile_cache._file_cache(Path("x"), print), CacheInterface)


@pytest.fixture
def unused():
    """JAX without a cache, whatever ran in this process before."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def no_home():
    raise RuntimeError("Could not determine home directory.")


PLACES = {
    "file": (lambda path: {"JINT8_CACHE": str(path / "file")}, "file"),
    "below_a_file": (lambda path: {"JINT8_CACHE": str(path / "file" / "x")}, "file"),
    "no_home": (lambda path: {}, "Expected $JINT8_CACHE or a home directory"),
}


@pytest.mark.parametrize(("place", "message"), PLACES.values(), ids=PLACES)
def test_no_place_for_it(place, message, unused, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    for name in ("JINT8_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_compile_cache.Path, "home", no_home)
    for name, value in place(tmp_path).items():
        monkeypatch.setenv(name, value)
    _common.use_compile_cache(argparse.Namespace(no_compile_cache=False, quiet=False))
    assert jax.config.jax_compilation_cache_dir is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("compiled programs are not kept: ")
    assert message in line
