"""What benchmarks/gpu_programs.py reads from a model's programs, and that int8's keep to their budgets."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jint8
from pallas_kernels import nogpu
from pallas_kernels.chips import CHIPS

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_programs

# A layer has four products: two launches each for one row, four or five for many, and what is no product.
STEP, PREFILL = 24, 48

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


@pytest.mark.nightly
@pytest.mark.skipif(nogpu.missing() is not None, reason=str(nogpu.missing()))
@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("what", "budget"), [("step", STEP), ("prefill", PREFILL)])
def test_launches_of_a_layer(chip, what, budget):
    found = gpu_programs.per_layer(gpu_programs.MODELS["Llama-3.1-8B"], CHIPS[chip], "int8", what)
    kernels = found["by_kind"]["custom-call"]
    assert kernels == 8 if what == "step" else 16 <= kernels <= 20, "the kernels aren't taken"
    assert found["per_layer"] <= budget, found
    assert not found["synchronizing"]
    assert not found["rewritten_weights"]


@pytest.mark.slow
@pytest.mark.skipif(nogpu.missing() is not None, reason=str(nogpu.missing()))
@pytest.mark.parametrize(("rows", "one", "three"), [(1, 2, 4), (1024, 4, 8), (8192, 5, 9)])
def test_products_of_one_x_quantize_it_once(rows, one, three):
    chip = CHIPS["sm_80"]
    w = jax.eval_shape(lambda: jint8.quantize(jnp.ones((1024, 1024)), contract_axes=(1,)))
    x = jax.ShapeDtypeStruct((rows, 1024), jnp.bfloat16)

    def products(x, *weights):
        return [jint8.matmul(x, w) for w in weights]

    for weights, launches in (([w], one), ([w] * 3, three)):
        text = gpu_programs.compile_for(chip, products, x, *weights)
        assert gpu_programs.read(text, set()).launches == {"custom-call": launches}


@pytest.mark.slow
@pytest.mark.skipif(nogpu.missing() is not None, reason=str(nogpu.missing()))
@pytest.mark.parametrize("rows", [1, 1024])
def test_smoothing_and_rotation_are_in_the_kernel_that_quantizes(rows):
    config = jint8.Config.preset("rotated")
    w = jax.eval_shape(lambda: jint8.quantize(jnp.ones((1024, 1024)), contract_axes=(1,), config=config))
    x = jax.ShapeDtypeStruct((rows, 1024), jnp.bfloat16)
    text = gpu_programs.compile_for(CHIPS["sm_90"], lambda x, w: jint8.matmul(x, w), x, w)
    assert gpu_programs.read(text, set()).launches == {"custom-call": 2}
