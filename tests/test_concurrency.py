"""Threads that use everything at once with different configs, processes that share a cache, and fork after import."""

import faulthandler
import os
import subprocess
import sys
import threading

import cases
import flax.linen as nn
import flax.nnx as nnx
import jax
import numpy as np
import pytest
from family_files import DIRECTORY

import jint8
from jint8 import Config

# Some of the answers differ between configs: one that is used for another shows.
PROMPTS = [[44, 38, 33], [51, 2, 32], [5, 1, 11]]
CONFIGS = [Config(threshold=0.0), Config(threshold=0.5), Config(outliers="token", threshold=0.5), None]
THRESHOLDS = [0.0, 1.0, 2.0]
LONGEST = 300  # seconds after which threads that don't end hang


class Layer(nn.Module):
    """One of each kind: its own interceptors, a product that no handler knows, standard layers."""

    @nn.compact
    def __call__(self, x):
        weight = self.param("weight", nn.initializers.normal(), (x.shape[-1], 24))
        return nn.Dense(8)(nn.gelu(nn.Dense(32)(x @ weight)))


class Own(nnx.Module):
    """A layer that no converter knows: its instances become those of a class that is made once."""

    def __init__(self):
        self.weight = nnx.Param(cases.normal(16, 8, seed=5))

    def __call__(self, x):
        return x @ self.weight[...]


def jobs():
    """By name, functions without arguments: each gives the same whenever it runs."""
    x = 4 * cases.normal(3, 16)
    kernel = cases.normal(16, 12, seed=1)
    layer = Layer()
    params = layer.init(jax.random.key(2), x)
    model = jint8.load(DIRECTORY / "llama", dtype="float32")

    def generated(i):
        chunks = model.generate_tokens(PROMPTS, max_tokens=6, config=CONFIGS[i], every=2)
        return np.concatenate(list(chunks), axis=1)

    def matmul(threshold):
        return jax.jit(lambda x, w: jint8.matmul(x, w))(x, jint8.quantize(kernel, config=Config(threshold=threshold)))

    def applied(threshold):
        tree = jint8.quantize_params(
            params, plan=jint8.plan(layer.apply, params, x), config=Config(threshold=threshold)
        )
        return jax.jit(jint8.apply(layer.apply))(tree, x)

    def of_nnx(threshold):
        return jint8.nnx.quantize(Own(), x, config=Config(threshold=threshold))(x)

    return {
        **{f"generate {i}": lambda i=i: generated(i) for i in range(len(CONFIGS))},
        **{f"matmul {t}": lambda t=t: matmul(t) for t in THRESHOLDS},
        **{f"apply {t}": lambda t=t: applied(t) for t in THRESHOLDS},
        **{f"float {t}": lambda t=t: layer.apply(params, x + t) for t in THRESHOLDS},
        **{f"nnx {t}": lambda t=t: of_nnx(t) for t in THRESHOLDS},
    }


def at_once(functions):
    """The results of all functions, each of which has a thread that starts when all are there."""
    results, barrier = {}, threading.Barrier(len(functions))

    def run(name, function):
        barrier.wait()
        try:
            results[name] = np.asarray(function())
        except Exception as error:
            results[name] = error

    # Daemons: the process can end, and show which test failed, when some of them hang.
    threads = [threading.Thread(target=run, args=item, daemon=True) for item in functions.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONGEST)
        if thread.is_alive():
            faulthandler.dump_traceback(sys.__stderr__)
            pytest.fail(f"Expected threads to end, got some that hang after {LONGEST} s: their stacks are above.")
    return results


def check_threads(functions, rounds):
    alone = {name: np.asarray(function()) for name, function in functions.items()}
    products = [value for name, value in alone.items() if name.startswith("matmul")]
    assert len({value.tobytes() for value in products}) == len(products)
    for _ in range(rounds):
        jax.clear_caches()
        for name, found in at_once(functions).items():
            if isinstance(found, Exception):
                raise found
            np.testing.assert_array_equal(found, alone[name], name)


@pytest.mark.slow
def test_threads_with_different_configs():
    check_threads({name: job for name, job in jobs().items() if name.split()[1] in ("1.0", "2.0")}, 1)


@pytest.mark.slow
def test_threads_that_are_switched_often():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        check_threads(jobs(), 10)
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.slow
def test_generations_at_once():
    """Of one model with two configs: in threads that compile both, and a step of one between those of the other."""
    model = jint8.load(DIRECTORY / "llama", dtype="float32")

    def start(i):
        return model.generate_tokens(PROMPTS, max_tokens=6, every=1, config=CONFIGS[i])

    jax.clear_caches()
    found = at_once({i: lambda i=i: list(start(i)) for i in range(2)})
    alone = [list(start(i)) for i in range(2)]
    assert not np.array_equal(*alone)
    np.testing.assert_array_equal([found[i] for i in range(2)], alone)
    together = [*zip(*map(start, range(2)), strict=True)]
    np.testing.assert_array_equal([*zip(*together, strict=True)], alone)


FORK = """
import multiprocessing, os, sys
import jint8, jint8.linen, jint8.nnx, jint8.models, jint8.checkpoints, jint8.analysis
jint8.load, jint8.LanguageModel  # imported when they are first used

def child():
    import jax.numpy as jnp
    total = float(jint8.matmul(jnp.ones((2, 8)), jint8.quantize(jnp.ones((8, 4)))).sum())
    os._exit(0 if total == 64 else 3)

from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
children = [multiprocessing.get_context("fork").Process(target=child) for _ in range(2)]
for one in children:
    one.start()
for one in children:
    one.join(100)
sys.exit(0 if [one.exitcode for one in children] == [0, 0] else 1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_children_compute_that_were_forked_after_import():
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True, timeout=200)


ON_A_CACHE = """
import argparse, sys
import numpy as np
import jint8
from jint8.cli._common import use_compile_cache

use_compile_cache(argparse.Namespace(no_compile_cache=False, quiet=True))
model = jint8.load(sys.argv[1], dtype="float32")
print(np.concatenate(list(model.generate_tokens([[1, 2, 3]], max_tokens=6)), axis=1).tolist())
"""


@pytest.mark.slow
def test_processes_on_one_cold_cache(tmp_path):
    """Two compile and write the same entries at the same time; a third reads them."""
    environment = os.environ | {"JINT8_CACHE": str(tmp_path)}

    def start():
        command = [sys.executable, "-c", ON_A_CACHE, str(DIRECTORY / "llama")]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    both = [start(), start()]
    outputs = [one.communicate(timeout=LONGEST) for one in both]
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.program")}
    assert written
    third = start()
    outputs.append(third.communicate(timeout=LONGEST))
    assert [one.returncode for one in (*both, third)] == [0, 0, 0], outputs
    assert len({*outputs}) == 1
    assert not outputs[0][1]  # nothing on standard error
    assert {*tmp_path.rglob("*.program")} == {*written}
    assert not [*tmp_path.rglob("*.partial")]
