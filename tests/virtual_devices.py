"""Scripts on eight virtual devices, which a process has or hasn't from its beginning."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jint8


def run_on_eight_devices(script, *arguments, optimized=True):
    """Runs a script of the tests -> the JSON object in the last line of its output.

    `optimized`: without, programs run slower and compile faster.
    """
    path = [Path(jint8.__file__).parents[1], Path(__file__).parent]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    flags |= {} if optimized else {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    env = {**os.environ, **flags, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run([sys.executable, script, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
