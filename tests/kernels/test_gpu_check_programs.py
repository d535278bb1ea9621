"""What `benchmarks/gpu_check.py` would run on GPUs, without one: its cases, and its programs lowered for CUDA."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import jint8
import pallas_kernels as pk
from jint8.models import Decoder
from pallas_kernels.chips import CHIPS

gpu_check = pytest.importorskip("gpu_check", reason="needs the benchmarks, which aren't in the wheel")
from gpu import correctness, decoder, operands, products, record, setting, tuning  # noqa: E402


@pytest.fixture(params=CHIPS.values(), ids=list(CHIPS))
def chip(request):
    """The GPU that programs are traced for within the test."""
    device = AbstractDevice(device_kind=request.param.device_kind, num_cores=request.param.cores, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield request.param


@pytest.fixture
def run(chip, tmp_path):
    """Record and setting of a stage on the GPU."""
    return record.Record(tmp_path / "stage.json"), setting.Setting(tmp_path)


def kernels(fn, args):
    """How many Pallas kernels are in the program; one that its backend can't express is an error here."""
    text = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    return len(re.findall(r"custom_call @\S*gpu", text))


def test_every_default_tile_is_checked(run, chip, monkeypatch):
    cases = []
    monkeypatch.setattr(correctness, "_run", lambda record, setting, found: cases.extend(found))
    kept, here = run
    for stage in (correctness.triton, correctness.mosaic_one_tile, correctness.mosaic):
        stage(kept, here)
    tiles = {config for (name, _), config in pk.default_configs().items() if name == chip.name}
    assert {options.get("config") for _, options in cases} == {*tiles, None}
    assert ("skipped" in kept.values) == (not chip.mosaic)
    configs = [(case, options["config"]) for case, options in cases if "config" in options]
    first = next(((case, config) for case, config in configs if config.kind == "mosaic"), None)
    assert (first is not None) == chip.mosaic
    if first is not None:  # it is one tile
        case, config = first
        assert (case.m, case.n, case.k, case.outliers) == (config.bm, config.bn, config.bk, 0)
    assert {case.mode for case, _ in cases} == {"batch", "token"}
    assert {case.dtype for case, _ in cases} == {"bfloat16", "float16", "float32"}
    assert any(case.bad for case, _ in cases)


def test_every_size_is_tuned_with_several_tiles(run, chip, monkeypatch):
    tried = {}
    monkeypatch.setattr(
        tuning, "_time", lambda r, s, size, found: tried.update({(size["m"], size["n"], size["backend"]): found})
    )
    kept, here = run
    tuning.run(kept, here)
    assert kept.values["failures"] == []
    backends = ("triton", "mosaic") if chip.mosaic else ("triton",)
    few = {(m, n, "triton") for m in (1, 16) for n in (4096, 14336)}
    assert set(tried) == few | {(2048, n, backend) for n in (4096, 14336) for backend in backends}
    assert all(len(found) > 1 for found in tried.values())


@pytest.fixture
def shapes_alone(monkeypatch):
    """Operands are shapes."""
    weights = operands.weights
    shape = lambda *size, dtype="bfloat16": jax.ShapeDtypeStruct(size, jnp.dtype(dtype))
    monkeypatch.setattr(operands, "weights", lambda seed, *, n, k: jax.eval_shape(lambda: weights(0, n=n, k=k)))
    monkeypatch.setattr(operands, "rows", lambda seed, *, m, k, outliers: shape(m, k))
    return shape


@pytest.mark.first_case
@pytest.mark.parametrize(
    "product",
    [
        pytest.param(p, id=f"{p.m}x{p.k}x{p.n}", marks=() if p == products.PRODUCTS[0] else pytest.mark.slow)
        for p in products.PRODUCTS
    ],
)
def test_products_lower_for_cuda(run, chip, product, shapes_alone):
    _, here = run
    programs, count = products._programs(product, here)
    assert {"bf16", "jint8 outliers=6"} <= set(programs)
    assert count * product.n * product.k >= 2 * 50e6 or product.m > 64 or count == 48
    for label, (fn, args) in programs.items():
        assert (kernels(fn, args) > 0) == (label not in products.XLAS), label


@pytest.mark.slow
def test_decoder_lowers_for_cuda(chip):
    model = Decoder(decoder.MODEL, jnp.bfloat16)
    floats = jax.eval_shape(lambda: decoder.parameters(model))
    trees = {"bf16": floats, "int8": jax.eval_shape(jint8.quantize_params, floats)}
    tokens = jax.ShapeDtypeStruct((1, decoder.PROMPT), jnp.int32)
    found = decoder.programs(model, trees, tokens, decoder.BATCHES, decoder.SLOTS)
    assert set(found) == {(kind, what) for kind in trees for what in (*decoder.BATCHES, "prefill")}
    for (kind, what), program in found.items():
        # Each of a layer's four products is at least one kernel; layers of the same kind may share their functions.
        assert (kernels(*program) >= 4) == (kind == "int8"), (kind, what)
