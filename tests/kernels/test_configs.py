"""Configs and the chips they are checked against."""

import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import pallas_kernels as pk
from pallas_kernels import chips, tune
from pallas_kernels.chips import CHIPS
from pallas_kernels.configs import from_json, shape_class, to_json


@pytest.mark.parametrize(
    ("key", "config"), pk.default_configs().items(), ids=lambda v: "-".join(v) if type(v) is tuple else ""
)
def test_defaults_fit_their_chip(key, config):
    pk.check_config(config, CHIPS[key[0]])
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize("chip", CHIPS.values(), ids=list(CHIPS))
@pytest.mark.parametrize("m", [1, 4, 16, 17, 32, 33, 64, 65, 2048])
@pytest.mark.parametrize("n", [1, 1000, 57344])
def test_every_shape_has_a_config(chip, m, n):
    for backend in ("triton", "mosaic") if chip.mosaic else ("triton",):
        pk.check_config(pk.pick_config(m, n, 4096, chip=chip, backend=backend), chip)


@pytest.mark.parametrize(
    ("config", "chip", "error", "words"),
    [
        (pk.TritonConfig(bm=96), "sm_80", ValueError, "powers of two"),
        (pk.TritonConfig(bn=16, panels=2), "sm_80", ValueError, "powers of two of at least 16"),
        (pk.TritonConfig(panels=3), "sm_80", ValueError, "Expected panels to divide bn"),
        (pk.TritonConfig(num_warps=6), "sm_80", ValueError, "Expected num_warps to be a power of two"),
        (pk.FewRowsConfig(num_stages=0), "sm_80", ValueError, "Expected every parameter to be at least 1"),
        (pk.FewRowsConfig(splits=0), "sm_80", ValueError, "Expected every parameter to be at least 1"),
        (
            pk.TritonConfig(bn=256, num_stages=4),
            "sm_80",
            ValueError,
            "at most 166912 bytes of shared memory on sm_80, got 196608",
        ),
        (pk.TritonConfig(bn=256, num_stages=4), "sm_90", ValueError, "registers of accumulators per thread, got 256"),
        (pk.MosaicConfig(), "sm_89", NotImplementedError, "Expected a chip with wgmma"),
        (pk.MosaicConfig(bm=64), "sm_90", ValueError, "Expected bm to be 128"),
    ],
)
def test_configs_that_cannot_work(config, chip, error, words):
    with pytest.raises(error, match=words):
        pk.check_config(config, CHIPS[chip])


@pytest.mark.parametrize(
    ("capability", "kind", "chip"),
    [
        ((8, 0), "", "sm_80"),
        ((8, 6), "", "sm_89"),
        ((9, 0), "", "sm_90"),
        ((12, 0), "", "sm_89"),
        ((10, 0), "", "sm_80"),
        (None, "NVIDIA H200", "sm_90"),
        (None, "NVIDIA A100-SXM4-80GB", "sm_80"),
        (None, "NVIDIA GeForce RTX 3090", "sm_89"),
    ],
)
def test_chip_for(capability, kind, chip):
    assert pk.chip_for(capability=capability, device_kind=kind).name == chip


@pytest.mark.parametrize("kind", ["few", "triton", "mosaic"])
def test_candidates_fit_and_include_the_defaults(kind):
    chip = CHIPS["sm_90"]
    found = tune.candidates(kind, chip)
    assert {c for (name, _), c in pk.default_configs().items() if name == "sm_90" and c.kind.startswith(kind)} <= set(
        found
    )
    for config in found + tune.all_candidates(kind, chip):
        pk.check_config(config, chip)


def test_every_tile_of_the_table_is_reachable():
    """A key that `shape_class` never returns would be a tile that nobody gets."""
    for chip in CHIPS.values():
        backends = ("triton", "mosaic") if chip.mosaic else ("triton",)
        sizes = [(1, 64), (16, 64), (32, 64), (64, 64), (65, 64), (2**20, 2**20)]
        names = {shape_class(*size, chip=chip, backend=b, planes=p) for size in sizes for b in backends for p in (1, 4)}
        assert {name for of, name in pk.default_configs() if of == chip.name} == names


def test_a_capability_is_of_one_chip():
    capabilities = [capability for chip in CHIPS.values() for capability in chip.capabilities]
    assert len(capabilities) == len(set(capabilities))
    for chip in CHIPS.values():
        assert pk.chip_for(capability=chip.architecture) is chip


def test_a_product_is_of_one_chip():
    names = [product for chip in CHIPS.values() for product in chip.products]
    assert len(names) == len(set(names))
    for chip in CHIPS.values():
        assert pk.chip_for(device_kind=chip.device_kind) is chip
        assert all(pk.chip_for(device_kind=f"NVIDIA {product} PCIe") is chip for product in chip.products)


@pytest.mark.parametrize(
    ("backend", "config", "message"),
    [
        ("mosaic", pk.TritonConfig(bm=128, bn=128), "Expected a config of backend 'mosaic', got TritonConfig"),
        ("triton", pk.MosaicConfig(bm=128, bn=128), "Expected a config of backend 'triton', got MosaicConfig"),
        (None, pk.TritonConfig(bm=100), "Expected block dimensions that are powers of two"),
    ],
)
def test_a_config_of_the_callers_is_checked(backend, config, message):
    x, w, scale = jnp.ones((4, 32)), jnp.ones((16, 32), jnp.int8), jnp.ones(16)
    with pytest.raises(ValueError, match=message):
        pk.llm_int8_matmul(x, w, scale, backend=backend, config=config, interpret=True)


@pytest.mark.parametrize(("text", "capability"), [("7.5", (7, 5)), ("12.0", (12, 0)), ("9", (9, 0)), (None, None)])
def test_capability_of_the_device(monkeypatch, text, capability):
    device = types.SimpleNamespace(platform="gpu" if text else "cpu", compute_capability=text or "")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert chips.current_capability() == capability
    assert chips.current_chip() is chips.chip_for(capability=capability)
    abstract = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract)):
        assert chips.current_capability() is None
        assert chips.current_chip().name == "sm_90"
