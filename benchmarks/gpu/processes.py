"""Stages in processes of their own: one that hangs, crashes or leaves something running doesn't touch the others.

A stage is a process group with a hard limit. It writes its measurements to `NAME.json` with a `Record`, its output goes
to `NAME.log`. What it has measured until it is killed stays. However it ends, nothing that it started stays alive: all
its descendants carry a mark in their environment, by which they are found even where they left the group.

Standard library only: a JAX that can't be imported, or a GPU that can't be used, is a failure of the stages.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu.record import read_json, write_json

MARK = "JINT8_GPU_CHECK_STAGE"
GRACE = 2.0  # seconds that helpers of a stage (a compiler, say) may live on after it
UNKILLABLE = 10.0  # seconds after which a process that was killed is given up: it hangs in the driver
LOG_TAIL = 2000  # characters


@dataclass(frozen=True)
class Stage:
    """A name, and the seconds after which the stage is killed."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: `"done"`, `"skipped"` or `"failed"`, why, and after how many seconds."""

    name: str
    status: str
    reason: str
    seconds: float


def run_stages(
    stages: Sequence[Stage],
    command: Callable[[str], Sequence[str]],
    out: Path,
    *,
    total: float = float("inf"),
    environment: dict[str, str] | None = None,
) -> Iterator[Outcome]:
    """Runs stages one after the other, and says of each how it ended.

    Args:
      stages: in their order.
      command: from a stage's name to what starts it.
      out: folder of `NAME.json` and `NAME.log`.
      total: seconds for all; a stage that begins late has what is left.
      environment: variables beside those of this process.

    Yields:
      An outcome as each stage ends; by then it is in the stage's JSON, too.
    """
    begin = time.monotonic()
    for stage in stages:  # what an earlier run left
        for suffix in (".json", ".log", ".unreadable"):
            (out / f"{stage.name}{suffix}").unlink(missing_ok=True)
    for stage in stages:
        limit = min(stage.seconds, total - (time.monotonic() - begin))
        start = time.monotonic()
        problems = ["no time was left for it"]
        if limit > 0:
            problems = _run(stage.name, command(stage.name), out, limit, environment or {})
        values, unreadable = _result(out / f"{stage.name}.json")
        problems += unreadable
        if not problems and not values.get("ended"):
            problems = ["it ended before its work was done"]
        problems += [str(failure) for failure in values.get("failures", ())]
        status = "failed" if problems else "skipped" if "skipped" in values else "done"
        reason = "; ".join(problems) or str(values.get("skipped", ""))
        outcome = Outcome(stage.name, status, reason, round(time.monotonic() - start, 1))
        log = out / f"{stage.name}.log"
        if status == "failed" and log.exists():
            values["log"] = log.read_text(errors="replace")[-LOG_TAIL:]
        write_json(out / f"{stage.name}.json", {**vars(outcome), **values})
        yield outcome


def _run(name: str, command: Sequence[str], out: Path, limit: float, environment: dict[str, str]) -> list[str]:
    """Runs one command, and gives what went wrong with its processes. None of them is alive afterwards."""
    mark = f"{name}-{os.getpid()}-{time.monotonic_ns()}"
    problems = []
    with (out / f"{name}.log").open("wb") as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **environment, MARK: mark},
        )
    try:
        code = child.wait(limit)
        if code < 0:
            problems.append(f"it crashed with {signal.Signals(-code).name}")
        elif code:
            problems.append(f"it ended with status {code}")
        end = time.monotonic() + GRACE
        while (left := _alive(mark)) and time.monotonic() < end:
            time.sleep(0.05)
        if left:
            problems.append(f"it left {len(left)} process{'es' if len(left) > 1 else ''} running, which were killed")
    except subprocess.TimeoutExpired:
        problems.append(f"killed after its limit of {limit:.3g} s: what it measured until then is kept")
    finally:  # also where this process is told to end
        if survivors := _kill(child, mark):
            problems.append(f"processes that can't be killed: {survivors}")
    return problems


def _kill(child: subprocess.Popen[bytes], mark: str) -> set[int]:
    """Kills a stage's process group, and what has its mark; gives those that are alive nevertheless."""
    end = time.monotonic() + UNKILLABLE
    while True:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        alive = _alive(mark)
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if child.poll() is not None and not alive:
            return set()
        if time.monotonic() > end:
            return alive | ({child.pid} if child.poll() is None else set())
        time.sleep(0.02)


def _alive(mark: str) -> set[int]:
    """Processes that have the mark in the environment that they were started with; nothing where there is no /proc."""
    wanted, found = f"{MARK}={mark}".encode(), set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # of others, or ended meanwhile
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.add(int(folder.name))
    return found


def _result(path: Path) -> tuple[dict[str, Any], list[str]]:
    """What a stage wrote, and what is wrong with it."""
    try:
        values = read_json(path)
    except ValueError as error:
        path.replace(path.with_suffix(".unreadable"))
        return {}, [f"its result is unreadable: {error}"]
    if not isinstance(values, dict) or not isinstance(values.get("failures", []), list):
        path.replace(path.with_suffix(".unreadable"))
        return {}, ["its result isn't what stages write"]
    return values, []
