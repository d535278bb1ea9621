"""A model over the devices of several processes equals the one of a single device; a missing process is an error."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from family_files import DIRECTORY, expected

import jint8

WORKER = Path(__file__).parent / "model_in_processes.py"
LAUNCH = Path(__file__).parents[2] / "examples" / "launch.py"
LIMIT = 120  # seconds, after which a hanging test fails


def launch(*arguments, processes):
    """Runs the worker in so many processes, of one device each -> the finished launcher, and seconds."""
    path = [Path(jint8.__file__).parents[1], Path(__file__).parents[1]]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, LAUNCH, "--processes", str(processes), WORKER, *arguments]
    begin = time.monotonic()
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT)
    return done, time.monotonic() - begin


@pytest.fixture(scope="module")
def found():
    done, _ = launch("llama", processes=2)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def alone():
    return jint8.load(DIRECTORY / "llama", dtype="float32")


def test_there_are_two_processes(found):
    assert found["processes"] == 2
    assert found["bytes_here"] < 0.6 * found["bytes"]


def test_logits(found, alone):
    want = np.asarray(alone.logits(expected("llama")["tokens"][:1]))
    assert np.abs(np.array(found["logits"]) - want).max() < 1e-4 * np.abs(want).max()


def test_greedy_tokens(found, alone):
    tokens = expected("llama")["tokens"][0]
    prompts = [tokens[:11].tolist(), tokens[5:9].tolist()]
    want = np.concatenate(list(alone.generate_tokens(prompts, max_tokens=5)), axis=1)
    assert found["greedy"] == want.tolist()
