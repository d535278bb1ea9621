"""`benchmarks/gpu_check.py` works, at toy sizes, before a GPU is there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = ("check", "ceilings", "products")  # tuning and the decoder compile for a minute


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="needs the benchmarks, which aren't in the wheel")
def test_stages_at_toy_sizes(tmp_path):
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_check.py", "--toy", "--out", tmp_path, "--stages", *STAGES],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {stage: json.loads((tmp_path / f"{stage}.json").read_text()) for stage in STAGES}
    assert not any("error" in result for result in found.values())
    assert found["check"]["passed"] > 0
    assert found["check"]["failures"] == []
    assert found["products"]["table"][0]["times bf16"] > 0
