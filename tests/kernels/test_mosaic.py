"""The Mosaic kernel, interpreted by JAX 0.11 and later and compiled on Hopper, against the float64 oracle.

The interpreter fills memory that nobody wrote with NaN and the largest integers, and refuses a kernel that ends with a
barrier's phase unwaited for. What it can't see, such as a slot that is released before wgmma has read it, is checked in
the machine code (test_budgets.py).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.test_kernels import INTERPRET, THRESHOLD, check, make_case, with_rows

import pallas_kernels as pk
from pallas_kernels import matmul
from pallas_kernels.chips import CHIPS
from pallas_kernels.mosaic import _pallas, many_rows

SMALL = pk.MosaicConfig(bn=128, num_stages=2, group=1)
WIDE = pk.MosaicConfig(bn=256, num_stages=3, group=2)
PAIRS = pk.MosaicConfig(bn=128, num_stages=2, cluster=2)

interpreted = pytest.mark.skipif(
    (INTERPRET and not _pallas.CAN_INTERPRET) or not (INTERPRET or pk.current_chip().mosaic),
    reason="needs a Hopper GPU, or JAX 0.11 for its interpret mode",
)


def _quick(names, *quick):
    """The names as parameters, all but the quick ones marked slow: they run interpreted, five seconds each."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


@pytest.fixture(autouse=True)
def three_multiprocessors(monkeypatch):
    """Fewer blocks than tiles, so that blocks go on from one tile to the next."""
    if INTERPRET:
        hopper = dataclasses.replace(CHIPS["sm_90"], cores=3)
        monkeypatch.setattr(matmul, "CHIPS", CHIPS | {"sm_90": hopper})


def run(case, config, *, threshold=THRESHOLD, mode="batch"):
    y = pk.llm_int8_matmul(
        *case[:3], bias=case.bias, threshold=threshold, mode=mode, config=config, interpret=INTERPRET
    )
    check(y, case, threshold, mode)
    return np.asarray(y, np.float32)


# Two or three tiles of rows, the last one nearly empty; two of channels.
WHOLE = make_case(130, 256, 256)
# No size is a multiple of the tile's: the last tile of channels overlaps the one before, the last step hangs over k.
TAILS = make_case(130, 320, 192)
CASES = {
    "whole_tiles": (WHOLE, SMALL),
    "no_outliers": (make_case(130, 256, 256, outliers=0), SMALL),
    "all_outliers": (WHOLE._replace(x=WHOLE.x + 20), SMALL),
    "float16": (make_case(130, 320, 192, "float16"), SMALL),
    "tails": (TAILS, SMALL),
    "33_rows": (make_case(33, 320, 192), SMALL),
    "wide_tile": (make_case(270, 320, 320, outliers=150), WIDE),
    "pairs_of_blocks": (make_case(270, 320, 320, outliers=70), PAIRS),
    "no_bias": (make_case(130, 256, 256, bias=False), SMALL),
    "nan_row": (with_rows(TAILS, (2, 7), jnp.nan), SMALL),
    "nan_row_beside_outlier": (with_rows(with_rows(TAILS, (2, 7), jnp.nan), (1, 7), 100.0), SMALL),
    "inf_row": (with_rows(TAILS, (4, 100), -jnp.inf), SMALL),
    "zero_rows": (with_rows(TAILS, np.array([0, 3]), 0.0), SMALL),
}


@pytest.mark.first_case
@interpreted
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # NumPy, about infinity times 0
@pytest.mark.parametrize("name", _quick(CASES, "whole_tiles", "tails", "nan_row_beside_outlier"))
def test_outliers_as_floats(name):
    run(*CASES[name])


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize(
    "name", _quick(["whole_tiles", "no_outliers", "all_outliers", "wide_tile", "tails", "inf_row"], "tails")
)
def test_outliers_as_digits_are_those_of_triton_bit_for_bit(name):
    case, config = CASES[name]
    y = run(case, config, mode="token")
    triton = run(case, pk.TritonConfig(), mode="token")
    np.testing.assert_array_equal(y, triton)


@interpreted
@pytest.mark.slow
def test_threshold_zero_is_that_of_triton_bit_for_bit():
    y, triton = (run(TAILS, config, threshold=0.0) for config in (SMALL, pk.TritonConfig()))
    np.testing.assert_array_equal(y, triton)


@interpreted
@pytest.mark.slow
def test_token_rows_are_independent_bit_for_bit():
    other = TAILS._replace(x=jnp.concatenate([TAILS.x[:1], TAILS.x[1:][::-1] * 40]))
    first, second = (run(case, SMALL, mode="token")[0] for case in (TAILS, other))
    np.testing.assert_array_equal(first, second)


@pytest.fixture
def detecting(monkeypatch):
    """Makes a race an error."""
    if not INTERPRET:
        pytest.skip("the interpreter detects races")
    from jax.experimental.pallas import mosaic_gpu as plgpu

    # The two views of a ring are buffers of their own here: of views of the same memory the detector says that any two
    # accesses race, also those to different slots. A slot's number goes to and fro in the same way for both.
    def both(rows, k, config, floats):
        ring = many_rows._buffer(config.num_stages, rows, config.bk, dtype=jnp.int8)
        wide = many_rows._buffer(config.num_stages, rows, config.bk // 2, dtype=floats or jnp.bfloat16)
        return ring if floats is None else (ring, wide)

    params = plgpu.InterpretGPUParams(detect_races=True)
    monkeypatch.setattr(many_rows, "_ring", both)
    monkeypatch.setattr(_pallas, "interpret_arguments", lambda interpret: {"interpret": params})
    return monkeypatch


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("mode", _quick(["batch", "token"], "batch"))
def test_no_races(detecting, mode):
    run(make_case(256, 256, 256), SMALL, mode=mode)


@interpreted
def test_a_race_is_found(detecting):
    # The producer refills slots that the consumers still read, and these don't wait for what they read.
    detecting.setattr(many_rows.plgpu, "barrier_wait", lambda barrier: None)
    # JAX 0.11 sees before that a barrier went on without anyone waiting for it.
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"RACE DETECTED|no threads observed"):
        run(make_case(128, 128, 512), SMALL, threshold=0.0)
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    gpu_callbacks.reset_gpu_interpret_mode_state()  # which an error leaves behind


@interpreted
@pytest.mark.slow
def test_vmap():
    def product(x):
        return pk.llm_int8_matmul(x, *WHOLE[1:3], bias=WHOLE.bias, config=SMALL, interpret=INTERPRET)

    x = jnp.stack([WHOLE.x, WHOLE.x[::-1]])
    for y, row in zip(jax.vmap(product)(x), x, strict=True):
        check(y, WHOLE._replace(x=row), THRESHOLD, "batch")


def test_what_it_does_not_support_goes_to_triton():
    chip = CHIPS["sm_90"]

    def kind(m, n, k, dtype="bfloat16"):
        return pk.pick_config(m, n, k, chip=chip, dtype=dtype).kind

    assert kind(2048, 4096, 4096) == kind(100, 4032, 960) == "mosaic"
    assert (
        kind(2048, 4000, 4096)
        == kind(2048, 4096, 4000)
        == kind(2048, 100, 4096)
        == kind(2048, 4096, 4096, "float32")
        == "triton"
    )
    assert pk.pick_config(2048, 4096, 4096, chip=CHIPS["sm_80"]).kind == "triton"
    with pytest.raises(NotImplementedError, match="Expected at least a tile"):
        jax.eval_shape(
            lambda *args: pk.llm_int8_matmul(*args, config=SMALL, interpret=True),
            WHOLE.x,
            WHOLE.w[:100],
            WHOLE.w_scale[:100],
        )
