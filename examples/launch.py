"""Runs a script in several processes on this machine, and ends them all when one fails.

    python launch.py --processes 8 many_processes.py path/to/checkpoint                     # 8 CPU processes, or GPUs
    python launch.py --processes 8 --hosts 4 --host 0 --coordinator host0:8476 ...          # on the first of four hosts

The script gets `--coordinator`, `--processes` (of all hosts) and `--process` behind its own arguments. On a machine
with several GPUs each process sees one of them.
"""

import argparse
import os
import socket
import subprocess
import sys
import time


def launch(command, *, processes, hosts=1, host=0, coordinator=None):
    """Runs `command` so often; returns the exit status of the first that fails, else 0."""
    coordinator = coordinator or free_address()
    running = []
    try:
        for i in range(processes):
            which = ["--processes", hosts * processes, "--process", host * processes + i, "--coordinator", coordinator]
            env = os.environ | {"JAX_LOCAL_DEVICE_IDS": str(i)}  # which of the GPUs
            running.append(subprocess.Popen([sys.executable, *command, *map(str, which)], env=env))
        return wait(running)
    finally:
        for process in running:
            process.kill()
            process.wait()


def wait(running):
    """The exit status of the first process that fails; 0 when all have ended well."""
    while True:
        codes = [process.poll() for process in running]
        for i, code in enumerate(codes):
            if code:
                print(f"process {i} of {len(codes)} ended with status {code}; ending the others", file=sys.stderr)
                return abs(code)
        if None not in codes:
            return 0
        time.sleep(0.1)


def free_address():
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, required=True, help="on this machine")
    parser.add_argument("--hosts", type=int, default=1, help="how many machines there are")
    parser.add_argument("--host", type=int, default=0, help="which one this is, from 0")
    parser.add_argument("--coordinator", help="HOST:PORT of the first process; default: a free port of this machine")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="SCRIPT ...")
    args = parser.parse_args()
    if args.hosts > 1 and args.coordinator is None:
        parser.error("Expected --coordinator with several hosts")
    options = {"processes": args.processes, "hosts": args.hosts, "host": args.host, "coordinator": args.coordinator}
    sys.exit(launch(args.command, **options))


if __name__ == "__main__":
    main()
