"""A model over the devices of several processes equals the one of a single device; a missing process is an error."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import find_smollm2
from family_files import DIRECTORY, expected
from tiny_model import make_llama_directory

import jint8

WORKER = Path(__file__).parent / "model_in_processes.py"
EXAMPLES = Path(__file__).parents[2] / "examples"
LAUNCH = EXAMPLES / "launch.py"
PATH = [Path(jint8.__file__).parents[1], Path(__file__).parents[1]]
ENV = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # one device in each process
ENV |= {"JINT8_NATIVE": "named"}  # on several devices XLA multiplies, so it does in what they are compared with
ENV |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": os.pathsep.join(map(str, PATH))}
free_address = runpy.run_path(str(LAUNCH))["free_address"]
LIMIT = 120  # seconds, after which a hanging test fails


def launch(script, *arguments, processes=2, limit=LIMIT):
    """Runs a script in so many processes, of one device each -> the finished launcher."""
    command = [sys.executable, LAUNCH, "--processes", str(processes), script, *arguments]
    return subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=limit)


def worker(*arguments, coordinator):
    """A process of two, without the launcher."""
    command = [sys.executable, WORKER, "llama", "--processes", "2", "--coordinator", coordinator]
    return subprocess.Popen([*command, *arguments], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(autouse=True)
def by_xla(monkeypatch):
    monkeypatch.setenv("JINT8_NATIVE", "named")


@pytest.fixture(scope="module")
def found():
    done = launch(WORKER, "llama")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_there_are_two_processes(found):
    assert found["processes"] == 2
    assert found["bytes_here"] < 0.6 * found["bytes"]


@pytest.mark.slow
def test_logits(found):
    check_logits(found)


@pytest.mark.slow
def test_four_processes():
    done = launch(WORKER, "llama", processes=4)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["processes"] == 4
    assert found["bytes_here"] < 0.4 * found["bytes"]
    check_logits(found)


def check_logits(found):
    alone = jint8.load(DIRECTORY / "llama", dtype="float32")
    want = np.asarray(alone.logits(expected("llama")["tokens"][:1]))
    assert np.abs(np.array(found["logits"]) - want).max() < 1e-4 * np.abs(want).max()


@pytest.mark.slow
def test_the_example_generates_the_greedy_tokens_of_one_device(tmp_path):
    checkpoint = make_llama_directory(tmp_path / "llama", seed=0)
    done = launch(EXAMPLES / "many_processes.py", str(checkpoint), "--prompt", "hello", "--max-tokens", "16")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(jint8.load(checkpoint).generate("hello", max_tokens=16) + "\n")


@pytest.mark.slow
@pytest.mark.skipif(find_smollm2() is None, reason="needs SmolLM2-135M-Instruct in the cache or at $JINT8_TEST_SMOLLM2")
def test_text_of_smollm2_in_four_processes():
    path, prompt = str(find_smollm2()), "The capital of France is"
    options = "--prompt", prompt, "--max-tokens", "12"
    done = launch(EXAMPLES / "many_processes.py", path, *options, processes=4, limit=5 * LIMIT)
    assert done.returncode == 0, done.stderr
    # What follows depends on the order of sums.
    beginning = " Paris.\n\nThe "
    assert beginning in done.stdout
    assert jint8.load(path).generate(prompt, max_tokens=12).startswith(beginning)


def test_the_launcher_ends_the_others_when_a_process_is_killed():
    done = launch(WORKER, "llama", "--die", "1")
    assert done.returncode == signal.SIGKILL
    assert "process 1 of 2 ended with status -9; ending the others" in done.stderr


@pytest.mark.slow
def test_without_it_they_end_by_themselves():
    coordinator = free_address()
    others, killed = (
        worker("--die", "1", "--process", str(i), "--timeout", "10", coordinator=coordinator) for i in range(2)
    )
    _, err = others.communicate(timeout=LIMIT)
    killed.communicate(timeout=LIMIT)
    assert killed.returncode == -signal.SIGKILL
    assert others.returncode != 0
    assert "Connection closed by peer" in err or "heartbeat" in err


@pytest.mark.slow
def test_a_process_that_does_not_come():
    begin, alone = time.monotonic(), worker("--process", "0", "--timeout", "3", coordinator=free_address())
    _, err = alone.communicate(timeout=LIMIT)
    assert alone.returncode != 0
    assert time.monotonic() - begin > 3
    assert "process 0 of 2 waits up to 3 seconds at 127.0.0.1:" in err
    assert "DEADLINE_EXCEEDED" in err
