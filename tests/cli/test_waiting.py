"""What is said to somebody who waits, and when it isn't."""

import argparse
import threading
import time

import pytest

from jint8.cli import _waiting
from jint8.cli._waiting import LOWERED, READY, Compilation, progress_bar, said_if_slow

LOUD, QUIET = argparse.Namespace(quiet=False), argparse.Namespace(quiet=True)


@pytest.fixture(autouse=True)
def long(monkeypatch):
    monkeypatch.setattr(_waiting, "LONG", 0.2)


@pytest.fixture
def said():
    return []


@pytest.fixture
def watch(said):
    watch = Compilation()
    watch.say = said.append
    return watch


def test_slow(capsys):
    with said_if_slow(LOUD, "working"):
        time.sleep(0.5)
    assert capsys.readouterr().err == "working\n"


def test_quick_or_quiet(capsys):
    with said_if_slow(LOUD, "working"):
        pass
    with said_if_slow(QUIET, "working"):
        time.sleep(0.3)
    time.sleep(0.3)
    assert capsys.readouterr().err == ""


def test_a_bar_only_on_a_terminal(capsys, monkeypatch):
    with progress_bar(LOUD, "loading", "reading x") as progress:
        progress(1, 2)
        time.sleep(0.5)
    assert capsys.readouterr().err == "reading x\n"
    pytest.importorskip("tqdm")
    monkeypatch.setattr(_waiting.sys.stderr, "isatty", lambda: True)
    with progress_bar(LOUD, "loading", "reading x") as progress:
        progress(1, 2)
        time.sleep(0.3)
        _waiting.say(LOUD, "meanwhile")
    err = capsys.readouterr().err
    assert "loading:  50%" in err
    assert "reading x" not in err
    assert "\rmeanwhile\n" in err  # in a line of its own


def test_compilation_adds_up(watch, said):
    for _ in range(3):
        watch.event(LOWERED, 0.0)
        time.sleep(0.1)
        watch.event(READY, 0.1)
        watch.event("/jax/other", 9.0)
    time.sleep(0.1)
    assert said == ["compiling"]


def test_compilation_is_said_meanwhile_and_once(watch, said):
    for _ in range(2):
        watch.event(LOWERED, 0.0)
        time.sleep(0.5)
        assert said == ["compiling"]
        watch.event(READY, 0.5)


def test_programs_that_are_read_are_not_compiled(watch, said):
    watch.event(LOWERED, 0.0)
    watch.found()
    time.sleep(0.5)
    watch.event(READY, 0.5)
    assert said == ["reading compiled programs"]


def test_quick_programs_are_not_said(watch, said):
    watch.event(LOWERED, 0.0)
    watch.event(READY, 0.0)
    watch.event(READY, 0.0)
    time.sleep(0.4)
    assert said == []


def test_threads_are_told_apart(watch, said):
    """What another thread finishes isn't what this one waits for."""
    watch.event(LOWERED, 0.0)
    other = threading.Thread(target=lambda: (watch.event(LOWERED, 0.0), watch.event(READY, 0.0)))
    other.start()
    other.join()
    time.sleep(0.5)
    assert said == ["compiling"]


def test_jax_tells(said):
    import jax
    import jax.numpy as jnp

    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: events.append(event))
    jax.jit(lambda x: x * 3 + 1)(jnp.ones(7))
    assert events.index(LOWERED) < events.index(READY)
