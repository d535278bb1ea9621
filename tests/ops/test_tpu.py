"""Programs for TPUs, compiled without one by libtpu: they compile, multiply int8 by int8, and widen no weight.

In a process of its own, because libtpu is a plugin that other tests shouldn't load.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import jint8

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COMPILE = """
import dataclasses, json, sys
import jint8, tpu_programs
mesh = tpu_programs.mesh_of(sys.argv[1], int(sys.argv[2]))
found = {}
for name, config in tpu_programs.CONFIGS.items():
    for m in (16, 96):
        found[f"{name}, {m} rows"] = tpu_programs.product(mesh, m, config, n=1024, k=512)
for what in ("prefill", "step"):
    found[what] = tpu_programs.decoder(mesh, tpu_programs.TINY, what, jint8.Config(), prompt=320)
print(json.dumps({name: dataclasses.asdict(program) for name, program in found.items()}))
"""


@pytest.mark.nightly
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install libtpu")
@pytest.mark.parametrize("chips", [1, 4])
@pytest.mark.parametrize("chip", ["v5e", "v6e", "v5p"])
def test_programs_compile_and_are_in_int8(chip, chips):
    paths = [str(Path(jint8.__file__).parents[1]), str(BENCHMARKS)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, chip, str(chips)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name, program in found.items():
        # A layer has four products. Those of many rows are in each way through a condition.
        assert program["s8"] >= (8 if name in ("prefill", "step") else 1), (name, program)
        assert program["loops"] == 0, (name, program)
        assert not program["widened"], (name, program)
        assert program["cycles"][0] > 0, (name, program)
    assert len(found["batch, 96 rows"]["cycles"]) == 3  # without outliers, with few, with many
