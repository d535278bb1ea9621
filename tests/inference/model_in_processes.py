"""Logits of a fixture over the devices of several processes, as JSON; see `test_processes.py`."""

import argparse
import json
import os
import runpy
import signal
import sys
from pathlib import Path

import jax
from family_files import DIRECTORY, expected
from jax.experimental import multihost_utils

import jint8

connect = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "many_processes.py"))["connect"]

parser = argparse.ArgumentParser()
parser.add_argument("name")
parser.add_argument("--timeout", type=int, default=20)
parser.add_argument("--die", type=int, help="the process that is killed before it computes")
parser.add_argument("--coordinator", required=True)
parser.add_argument("--processes", type=int, required=True)
parser.add_argument("--process", type=int, required=True)
args = parser.parse_args()
connect(args.coordinator, args.processes, args.process, args.timeout)

devices = jax.devices()[: args.processes]
mesh = jax.make_mesh((len(devices),), ("model",), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))
model = jint8.load(DIRECTORY / args.name, dtype="float32", mesh=mesh)
leaves = jax.tree.leaves(model.params)
bytes_here = sum(leaf.addressable_data(0).nbytes for leaf in leaves)
if args.die == args.process:
    os.kill(os.getpid(), signal.SIGKILL)
tokens = expected(args.name)["tokens"][:1]
logits = multihost_utils.process_allgather(model.logits(tokens), tiled=True)
if args.process == 0:
    numbers = {
        "processes": jax.process_count(),
        "logits": logits.tolist(),
        "bytes": sum(leaf.nbytes for leaf in leaves),
        "bytes_here": bytes_here,
    }
    print(json.dumps(numbers))
sys.stdout.flush()
jax.distributed.shutdown()
