"""Stages of `benchmarks/gpu_check.py` that hang, crash, corrupt or leave something behind: toys, in real processes."""

import json
import os
import sys
from pathlib import Path

import pytest

processes = pytest.importorskip("gpu.processes", reason="needs the benchmarks, which aren't in the wheel")

BENCHMARKS = Path(processes.__file__).parents[1]

# Each writes one measurement, and then does what it is named after.
TOYS = {
    "works": "record.end()",
    "hangs": "time.sleep(600)",
    "aborts": "os.abort()",
    "raises": "raise ValueError('a broken stage')",
    "stops_early": "sys.exit(0)",
    "is_wrong": "record.fail('wrong: 3 instead of 4'); record.end()",
    "writes_nonsense": "record.end(); open(sys.argv[1], 'w').write('{\"measured\": [1, 2')",
    "writes_a_list": "record.end(); open(sys.argv[1], 'w').write('[]')",
    "leaves_a_child": "record.end(); subprocess.Popen(SLEEP)",
    "leaves_a_daemon": "record.end(); subprocess.Popen(SLEEP, start_new_session=True)",
    "hangs_with_a_daemon": "subprocess.Popen(SLEEP, start_new_session=True); time.sleep(600)",
    "skips": "record.put(skipped='no GPU here'); record.end()",
}
TOY = """
import os, subprocess, sys, time
from pathlib import Path
from gpu.record import Record
SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
record = Record(Path(sys.argv[1]))
record.add("measured", {"us": 1.5})
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All toys, one after the other in one run: their outcomes and what they left on disk."""
    out = tmp_path_factory.mktemp("stages")
    (out / "works.json").write_text("of an earlier run")
    command = lambda name: [sys.executable, "-c", TOY + TOYS[name], str(out / f"{name}.json")]
    environment = {"PYTHONPATH": str(BENCHMARKS), "TOY_STAGES": str(out)}
    (works,) = processes.run_stages([processes.Stage("works", 60)], command, out, environment=environment)
    limit = max(1.0, 10 * works.seconds)  # on a busy machine, too, a toy measures something before it is killed
    stages = [processes.Stage(name, limit if "hangs" in name else 60) for name in TOYS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "GRACE", 0.2)
        outcomes = {o.name: o for o in processes.run_stages(stages, command, out, environment=environment)}
    return out, outcomes


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("works", "done", ""),
        ("hangs", "failed", "s: what it measured until then is kept"),
        ("aborts", "failed", "it crashed with SIGABRT"),
        ("raises", "failed", "it ended with status 1"),
        ("stops_early", "failed", "it ended before its work was done"),
        ("is_wrong", "failed", "wrong: 3 instead of 4"),
        ("writes_nonsense", "failed", "its result is unreadable"),
        ("writes_a_list", "failed", "its result isn't what stages write"),
        ("leaves_a_child", "failed", "it left 1 process running, which were killed"),
        ("leaves_a_daemon", "failed", "it left 1 process running"),
        ("hangs_with_a_daemon", "failed", "killed after its limit"),
        ("skips", "skipped", "no GPU here"),
    ],
)
def test_outcome(run, name, status, reason):
    out, outcomes = run
    assert list(outcomes) == list(TOYS)  # whatever the others did
    assert outcomes[name].status == status
    assert reason in outcomes[name].reason
    found = json.loads((out / f"{name}.json").read_text())
    assert (found["status"], found["reason"]) == (outcomes[name].status, outcomes[name].reason)
    if not name.startswith("writes"):
        assert found["measured"] == [{"us": 1.5}]


def test_the_log_says_why(run):
    out, _ = run
    assert "ValueError: a broken stage" in json.loads((out / "raises.json").read_text())["log"]
    assert (out / "writes_nonsense.unreadable").read_text() == '{"measured": [1, 2'


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_nothing_stays_alive(run):
    out, _ = run
    mark, alive = f"TOY_STAGES={out}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes():
                alive.append(folder.name)
        except OSError:
            continue
    assert alive == []


def test_the_time_for_all_is_limited(tmp_path):
    """A stage has what is left, and one for which nothing is left doesn't begin."""
    command = lambda name: [sys.executable, "-c", "import time; time.sleep(600)"]
    stages = [processes.Stage("first", 60), processes.Stage("second", 60)]
    first, second = processes.run_stages(stages, command, tmp_path, total=0.5)
    assert "killed after its limit" in first.reason
    assert second.reason.startswith("no time was left for it")
    assert first.seconds + second.seconds < 10
    assert os.listdir(tmp_path).count("second.log") == 0
