"""What benchmarks/gpu_programs.py reads from a model's programs, and that int8's keep to their budgets."""

import sys
from pathlib import Path

import pytest

from pallas_kernels import nogpu
from pallas_kernels.chips import CHIPS

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_programs

# A layer has four products: at most two launches each for one row, four for many, and what is no product.
STEP, PREFILL = 24, 46

TEXT = """HloModule jit_step

%fused (p: s8[4,8]) -> s8[4,8] {
  ROOT %copy.1 = s8[4,8]{1,0} copy(%p)
}

ENTRY %main (x: f32[2], w: s8[4,8]) -> f32[2] {
  %x = f32[2]{0} parameter(0)
  %w = s8[4,8]{1,0} parameter(1)
  %call = (s8[2,8]{1,0}, f32[2]{0}) custom-call(%x), custom_call_target="__gpu$xla.gpu.triton"
  %piece = s8[2,8]{1,0} get-tuple-element(%call), index=0
  %turned = s8[8,4]{1,0} fusion(%w), kind=kLoop, calls=%fused
  %loop = (s32[]) while(%x), condition=%c, body=%b
  ROOT %y = f32[2]{0} fusion(%piece), kind=kLoop, calls=%fused
}
"""


def test_what_is_read_from_a_program():
    found = gpu_programs.read(TEXT, {(4, 8)})
    assert found.launches == {"custom-call": 1, "fusion": 2, "while": 1}
    assert found.total == 4
    assert found.synchronizing == ["loop"]
    assert found.rewritten == ["turned: s8[8, 4]"]


@pytest.mark.slow
@pytest.mark.skipif(nogpu.missing() is not None, reason=str(nogpu.missing()))
@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("what", "budget"), [("step", STEP), ("prefill", PREFILL)])
def test_launches_of_a_layer(chip, what, budget):
    found = gpu_programs.per_layer(gpu_programs.MODELS["Llama-3.1-8B"], CHIPS[chip], "int8", what)
    assert found["by_kind"]["custom-call"] == (8 if what == "step" else 16), "the kernels aren't taken"
    assert found["per_layer"] <= budget, found
    assert not found["synchronizing"]
    assert not found["rewritten_weights"]
