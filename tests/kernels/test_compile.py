"""Every default config compiles for every chip: tensor cores used, nothing spilled, within budgets of machine code.

Needs no GPU but the packages of the extra `nogpu` (pallas_kernels/README.md). `resources.json` keeps what was found
with some toolchains; `python -m pallas_kernels.nogpu --out tests/kernels/resources.json` writes the entry of the one
that is there.
"""

import json
from pathlib import Path

import pytest

import pallas_kernels as pk
from pallas_kernels import nogpu
from pallas_kernels.chips import CHIPS
from pallas_kernels.configs import FewRowsConfig, MosaicConfig
from pallas_kernels.machine_code import Loop

PRODUCTS = ("_int8_matmul", "int8_matmul_mosaic_gpu")
# On sm_90: the least share of the tensor cores' minimum that a step over k is predicted to reach, and the most
# registers. A change that does worse is looked at; one that does better raises its budget.
BUDGETS = {
    "triton_small": (0.34, 96),
    "triton_medium": (0.67, 184),
    "triton_large": (0.68, 254),
    "mosaic_small": (0.96, 168),
    "mosaic_large": (0.98, 168),
}
# Bytes of weights that a multiprocessor should have under way to hide the latency of device memory: 0.6 µs at its part
# of the GPU's bandwidth (A100 2.0, RTX 4090 1.0, H100 3.35 TB/s), and as much again.
IN_FLIGHT = {
    name: 2 * 0.6e-6 * bandwidth / CHIPS[name].cores
    for name, bandwidth in (("sm_80", 2.0e12), ("sm_89", 1.0e12), ("sm_90", 3.35e12))
}
# Launches of a product: find, compact, quantize, gather, multiply; quantize and multiply.
LAUNCHES = {"many": 5, "few": 2}
KEPT = json.loads((Path(__file__).parent / "resources.json").read_text())

pytestmark = pytest.mark.skipif(nogpu.missing() is not None, reason=str(nogpu.missing()))


@pytest.fixture(scope="module", params=list(CHIPS))
def compiled(request):
    chip = CHIPS[request.param]
    resources = nogpu.run(chip)
    print(nogpu.table({chip.name: resources}))
    return chip, resources


def test_all_default_configs(compiled):
    chip, resources = compiled
    assert list(resources) == list(nogpu.cases(chip))
    for label, kernels in resources.items():
        products = [k for k in kernels if k["name"].startswith(PRODUCTS)]
        assert len(products) == 1, (label, [k["name"] for k in kernels])
        assert {"IMMA", "IGMMA"} & set(products[0]["tensor_core"]), (label, products)
        if chip.name == "sm_90" and not label.startswith("few"):
            assert "IGMMA" in products[0]["tensor_core"], (label, products)
        config = nogpu.cases(chip)[label][0]
        assert (products[0]["shared"] or 0) <= config.shared_bytes(), (label, "the config's estimate must bound it")
        for kernel in kernels:
            assert kernel["spilled"] == 0, (label, kernel)
            assert (kernel["shared"] or 0) <= chip.shared_bytes, (label, kernel)


def test_resources_are_those_that_are_kept(compiled):
    chip, resources = compiled
    kept = KEPT.get(nogpu.toolchain())
    if kept is None:
        pytest.skip(f"resources.json has no entry for {nogpu.toolchain()}")
    assert resources == kept[chip.name], "look at the difference, then write resources.json anew"


def test_budgets_of_the_loops(compiled):
    chip, resources = compiled
    if chip.name != "sm_90":
        pytest.skip("the cycles of a step are predicted for Hopper")
    many = {label: kernels for label, kernels in resources.items() if label in BUDGETS}
    assert many.keys() == BUDGETS.keys()
    for label, kernels in many.items():
        config = nogpu.cases(chip)[label][0]
        kernel = next(k for k in kernels if k["name"].startswith(PRODUCTS))
        over_k, *outliers = (Loop(**loop) for loop in kernel["loops"])
        warpgroups = 2 if isinstance(config, MosaicConfig) else config.num_warps // 4
        share = over_k.least_cycles(warpgroups) / over_k.predicted_cycles(warpgroups)
        least_share, registers = BUDGETS[label]
        assert share >= least_share, (label, over_k)
        assert kernel["registers"] <= registers, (label, kernel["registers"])
        if isinstance(config, MosaicConfig):
            # The products of a step follow each other without a barrier or a wait for the last one: int8 over all of k,
            # then bfloat16 over the outlier columns, each as wide as the tile.
            assert over_k.tensor_core == {f"IGMMA.64x{config.bn}x32": 4}, (label, over_k)
            assert [o.tensor_core for o in outliers] == [{f"HGMMA.64x{config.bn}x16": 4}], (label, outliers)
            for loop in (over_k, *outliers):
                assert loop.waits == [1], (label, loop)
                assert loop.barriers == loop.copies == 0, (label, loop)


def test_budgets_of_launches_and_bytes_in_flight(compiled):
    chip, resources = compiled
    for label, kernels in resources.items():
        config = nogpu.cases(chip)[label][0]
        few = isinstance(config, FewRowsConfig)
        launches = LAUNCHES["few" if few else "many"] + (label.startswith("few_128") and "threshold=0" not in label)
        assert len(kernels) <= launches, (label, [k["name"] for k in kernels])
        if few and "rows=" in label:
            kernel = next(k for k in kernels if k["name"].startswith(PRODUCTS))
            threads = 32 * config.num_warps
            blocks = min(
                chip.threads // threads,
                chip.registers // (-(-kernel["registers"] // 8) * 8 * threads),
                (chip.shared_bytes + 1024) // (kernel["shared"] + 1024),
            )
            in_flight = blocks * (config.num_stages - 1) * config.bn * config.bk
            assert in_flight >= IN_FLIGHT[chip.name], (label, blocks, in_flight)


@pytest.mark.parametrize("name", nogpu.BLACKWELL)
def test_blackwell(name):
    """It takes the tiles of an older chip."""
    chip = nogpu.BLACKWELL[name]
    older = pk.chip_for(capability=chip.architecture)
    chosen = {label: case for label, case in nogpu.cases(older).items() if label in ("few_16 rows=1", "triton_medium")}
    for label, kernels in nogpu.run(chip, chosen).items():
        product = next(k for k in kernels if k["name"].startswith(PRODUCTS))
        assert set(product["tensor_core"]) & {"IMMA", "UTCIMMA"}, (label, product)
        for kernel in kernels:
            assert kernel["spilled"] == 0, (label, kernel)
