"""One model over the devices of several processes: on CPUs, on GPUs, on several hosts.

Every process runs this with the same arguments but --process; the first also coordinates them, at --coordinator.
`launch.py` starts several of them on one machine.
"""

import argparse
import sys

import jax
from jax.sharding import AxisType

import jint8


def connect(coordinator, processes, process, timeout):
    """Joins the other processes, so that `jax.devices()` has the devices of all.

    JAX aborts a process whose others don't all come within `timeout` seconds, and one whose others stop: at once in a
    collective between CPUs, else when their heartbeat has been missing for so long.
    """
    print(
        f"process {process} of {processes} waits up to {timeout} seconds at {coordinator}", file=sys.stderr, flush=True
    )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # GPUs have NCCL
    jax.distributed.initialize(
        coordinator,
        processes,
        process,
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=timeout,
        shutdown_timeout_seconds=timeout,
    )


def main():
    """Loads the model over all devices and continues a prompt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--coordinator", required=True, help="HOST:PORT of the first process")
    parser.add_argument("--processes", type=int, required=True, help="how many there are")
    parser.add_argument("--process", type=int, required=True, help="which one this is, from 0")
    parser.add_argument("--timeout", type=int, default=60, help="seconds to wait for the others")
    args = parser.parse_args()
    connect(args.coordinator, args.processes, args.process, args.timeout)
    mesh = jax.make_mesh((jax.device_count(),), ("model",), axis_types=(AxisType.Auto,))
    model = jint8.load(args.checkpoint, mesh=mesh)
    text = model.generate(args.prompt, max_tokens=args.max_tokens)  # in every process, or none would come to an end
    if jax.process_index() == 0:
        print(text)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
