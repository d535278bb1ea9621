"""The examples run, and show what they are for."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()


@pytest.mark.first_case
@pytest.mark.parametrize("name", ["wrap_linen", "wrap_nnx", "scanned", "own_layer"])
def test_error_is_small(name, capsys):
    assert run(name) < 0.02
    assert "relative error" in capsys.readouterr().out


def test_lora_loss_falls():
    losses = run("lora")
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.slow
def test_qlora_loss_falls(capsys):
    losses = run("qlora")
    assert losses[-1] < 0.3 * losses[0]
    assert "0.16" in capsys.readouterr().out  # of the float bytes


def test_every_example_is_run():
    tested = {"wrap_linen", "wrap_nnx", "scanned", "own_layer", "lora", "qlora"}
    tested |= {"launch", "many_processes"}  # by tests/inference/test_processes.py
    tested |= {"mamba"}  # by tests/test_mamba_example.py
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested
