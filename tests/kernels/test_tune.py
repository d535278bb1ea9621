"""What a GPU found to be fast gets into the table, of the package or of one process."""

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels as pk
from pallas_kernels import tune
from pallas_kernels.chips import CHIPS


@pytest.mark.parametrize("chip", CHIPS.values(), ids=list(CHIPS))
@pytest.mark.parametrize("m", [1, 16, 64, 2048])
def test_the_entry_of_the_table_that_a_product_takes(chip, m):
    for backend in ("triton", "mosaic") if chip.mosaic else ("triton",):
        name = tune.entry_for(m, 14336, 4096, chip=chip, backend=backend)
        config = pk.default_configs()[chip.name, name]
        picked = pk.pick_config(m, 14336, 4096, chip=chip, backend=backend)
        assert type(picked) is type(config)
        assert (picked.bn, picked.num_stages) == (config.bn, config.num_stages)


def test_a_tile_in_the_table_is_what_is_multiplied_with():
    ops = jnp.ones((2, 64), jnp.bfloat16), jnp.ones((48, 64), jnp.int8), jnp.ones(48)
    chip = pk.current_chip()
    traced = []
    for config in (pk.FewRowsConfig(bn=16, bk=32), pk.FewRowsConfig(bn=16, bk=64)):
        with tune.in_table(chip, "few_16", config):
            traced.append(str(jax.make_jaxpr(lambda *ops: pk.llm_int8_matmul(*ops, interpret=True))(*ops)))
    assert traced[0] != traced[1]
    assert pk.default_configs()[chip.name, "few_16"] not in (config, None)


def _timed(**us):
    return [{"config": tune.to_json(pk.FewRowsConfig(bn=int(bn[2:]))), **found} for bn, found in us.items()]


def test_the_winner_is_right_and_fast_at_all_sizes():
    sizes = [
        {"entry": "few_16", "timed": _timed(bn16={"us": 1.0}, bn32={"us": 1.2}, bn64={"us": 3.0})},
        {
            "entry": "few_16",
            "timed": _timed(bn16={"error": "its result is wrong"}, bn32={"us": 10.0}, bn64={"us": 9.0}),
        },
        {"entry": None, "timed": []},
    ]
    result = {"chip": "sm_90", "device": "a GPU", "jax": "0.11.2", "sizes": sizes}
    winner = tune.to_json(pk.FewRowsConfig(bn=32))
    assert tune.winners(result) == {"few_16": winner}
    table = tune.apply(result)
    assert table["configs"]["sm_90"]["few_16"] == winner
    assert table["note"].startswith("sm_90: timed on a GPU with jax 0.11.2.")
    before = pk.default_configs()["sm_90", "few_16"]
    try:
        tune.use_winners(result)
        assert pk.pick_config(1, 8192, 4096, chip=CHIPS["sm_90"]).bn == 32
    finally:
        pk.default_configs()["sm_90", "few_16"] = before
