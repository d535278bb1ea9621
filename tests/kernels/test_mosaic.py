"""The Mosaic kernel, interpreted by JAX 0.11 and later and compiled on Hopper: bit for bit what Triton's gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.test_kernels import INTERPRET, THRESHOLD, check, make_case

import pallas_kernels as pk
from pallas_kernels._mosaic import CAN_INTERPRET
from pallas_kernels.chips import CHIPS

CONFIG = pk.MosaicConfig(bn=64, panels=2, num_stages=2, group=1)
CASE = make_case(130, 128, 256)  # two tiles of rows, the second nearly empty, and two of channels

interpreted = pytest.mark.skipif(
    (INTERPRET and not CAN_INTERPRET) or not (INTERPRET or pk.current_chip().mosaic),
    reason="needs a Hopper GPU, or JAX 0.11 for its interpret mode",
)


@interpreted
@pytest.mark.parametrize(
    ("outliers", "mode", "threshold", "bias"),
    [(0, "batch", 6.0, False), (150, "token", 6.0, True), (3, "batch", 0.0, True)],
    ids=["no_outliers", "many_outliers_per_token", "threshold=0"],
)
def test_product(outliers, mode, threshold, bias):
    case = make_case(130, 128, 256, outliers=outliers, bias=bias)
    y, triton = (
        pk.llm_int8_matmul(
            *case[:3], bias=case.bias, threshold=threshold, mode=mode, config=config, interpret=INTERPRET
        )
        for config in (CONFIG, pk.TritonConfig())
    )
    check(y, case, threshold, mode)
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(triton, np.float32))


@interpreted
def test_vmap():
    def product(x):
        return pk.llm_int8_matmul(x, *CASE[1:3], bias=CASE.bias, config=CONFIG, interpret=INTERPRET)

    x = jnp.stack([CASE.x, CASE.x[::-1]])
    for y, row in zip(jax.vmap(product)(x), x, strict=True):
        check(y, CASE._replace(x=row), THRESHOLD, "batch")


def test_what_the_tiles_do_not_divide_goes_to_triton():
    chip = CHIPS["sm_90"]
    assert pk.pick_config(2048, 4096, 4096, chip=chip, backend="mosaic").kind == "mosaic"
    assert pk.pick_config(2048, 4000, 4096, chip=chip, backend="mosaic").kind == "triton"
    assert pk.pick_config(2048, 4096, 4096, chip=chip, backend="mosaic", dtype="float32").kind == "triton"
    with pytest.raises(NotImplementedError, match="Expected whole tiles"):
        jax.eval_shape(
            lambda *args: pk.llm_int8_matmul(*args, config=CONFIG, interpret=True),
            CASE.x,
            CASE.w[:100],
            CASE.w_scale[:100],
        )
