"""Every default config compiles for every chip: tensor cores used, nothing spilled, within shared memory.

Needs no GPU but the packages of the extra `nogpu` (pallas_kernels/README.md). `resources.json` keeps what was found
with some toolchains; `python -m pallas_kernels.nogpu --out tests/kernels/resources.json` writes the entry of the one
that is there.
"""

import json
from pathlib import Path

import pytest

from pallas_kernels import nogpu
from pallas_kernels.chips import CHIPS

PRODUCTS = ("_int8_matmul", "int8_matmul_mosaic_gpu")
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
