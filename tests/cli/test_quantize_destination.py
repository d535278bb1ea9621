"""`jint8 quantize`: what can't be written is said before anything is read."""

import os
import shutil
from types import SimpleNamespace

import pytest
from tiny_model import make_llama_directory

import jint8
from jint8.checkpoints._destination import Destination
from jint8.cli import _common


@pytest.fixture
def source(tmp_path):
    return make_llama_directory(tmp_path / "llama", seed=1)


@pytest.fixture
def unread(monkeypatch):
    monkeypatch.setattr(_common, "load", lambda *args, **options: pytest.fail("read nevertheless"))


def test_current_directory(source, tmp_path, monkeypatch, run):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run("quantize", source, ".", "--quiet")[0] == 0
    jint8.load(".", verify=True)
    assert sorted(os.listdir(tmp_path)) == ["here", "llama"]


@pytest.mark.parametrize("options", [[], ["--format", "bitsandbytes"]], ids=["jint8", "bitsandbytes"])
def test_link_to_an_empty_directory(options, source, tmp_path, run):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert run("quantize", source, tmp_path / "link", "--quiet", *options)[0] == 0
    jint8.load(tmp_path / "real", verify=True)
    assert (tmp_path / "link").is_symlink()


@pytest.mark.usefixtures("unread")
def test_nothing_is_read_for_a_place_that_is_taken(source, tmp_path, run_error):
    (tmp_path / "file").touch()
    assert "Not a directory: '" in run_error("quantize", source, tmp_path / "file" / "dst", "--quiet")
    assert "got a file" in run_error("quantize", source, tmp_path / "file", "--quiet")
    assert "'config.json' is in it" in run_error("quantize", source, source, "--quiet")
    assert "got a file" in run_error("quantize", "owner/model", tmp_path / "file", "--quiet")  # nor downloaded


@pytest.mark.usefixtures("unread")
@pytest.mark.skipif(os.name == "nt", reason="Windows has no flock")
def test_nothing_is_read_while_another_one_writes(source, tmp_path, run_error):
    with Destination(tmp_path / "dst"):
        assert "dst: Expected to be the only writer" in run_error("quantize", source, tmp_path / "dst", "--quiet")


@pytest.mark.usefixtures("unread")
def test_nothing_is_read_for_a_full_disk(source, tmp_path, monkeypatch, run_error):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "MB of free space, got 0.0 MB" in run_error("quantize", source, tmp_path / "dst", "--quiet")
    assert os.listdir(tmp_path) == ["llama"]
