"""Products where the program says how it is divided: in `shard_map`, on a mesh with explicit axes, and on GPUs."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from virtual_devices import run_on_eight_devices

import jint8
from jint8._ops.export import _device

DEVICES = 8

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found():
    return run_on_eight_devices(Path(__file__).parent / "kinds_of_meshes.py", optimized=False)


SHARD_MAP = ["default 1", "default 64", "triton 1", "triton 64"]


@pytest.mark.parametrize("case", SHARD_MAP)
def test_a_column_parallel_product_in_a_shard_map_is_that_of_one_device(found, case):
    assert found["shard_map"][case]["column"] < 1e-6


@pytest.mark.parametrize("case", SHARD_MAP)
def test_a_row_parallel_product_in_a_shard_map_rounds_each_devices_columns_by_themselves(found, case):
    """Half a step of each device's own scale per feature, which is at most that of the whole row."""
    error = np.abs(np.array(found["shard_map"][case]["row"]))
    x, w = np.array(found["x"])[: len(error)], np.abs(np.array(found["w"]))
    outliers = (np.abs(x) >= 6).any(axis=0)
    kept = np.abs(np.where(outliers, 0, x)).reshape(len(x), DEVICES, -1)
    half_step = np.repeat(kept.max(axis=2) / 127 / 2, x.shape[1] // DEVICES, axis=1)
    half_step = np.where(outliers, np.abs(x).max() * 2**-15, half_step)
    assert outliers.any()
    assert (error <= 1.001 * half_step @ w.T + 1e-4).all()


@pytest.mark.parametrize(
    ("layout", "spec"),
    [
        ("column", [None, "model"]),
        ("row", [None, None]),
        ("column_and_row", [None, "data"]),
        ("batch_and_column", ["data", "model"]),
    ],
)
def test_explicit_axes(found, layout, spec):
    got = dict(found["explicit"][layout])
    assert got.pop("spec") == spec
    assert max(got.values()) < 1e-6


def test_experts_in_a_shard_map(found):
    assert found["experts"]["shard_map"]["error"] < 1e-6


@pytest.mark.parametrize(
    ("layout", "spec"),
    [
        ("column", [None, "model"]),
        ("row", [None, None]),
        ("batch_and_column", ["data", "model"]),
        ("expert", [None, "model"]),
    ],
)
def test_experts_on_explicit_axes(found, layout, spec):
    assert found["experts"][layout]["spec"] == spec
    assert found["experts"][layout]["error"] < 1e-6


SPEC = P("model", None)


def for_cuda(function, gpu, rows):
    """The program of `function(mesh, specs)(x, w)` for eight GPUs, from shapes."""
    mesh = AbstractMesh((DEVICES,), ("model",), axis_types=(AxisType.Auto,), abstract_device=_device(gpu))
    w = jax.eval_shape(lambda: jint8.quantize(jnp.ones((256 * DEVICES, 512)), contract_axes=(1,)))
    placed = jint8.shardings(w, SPEC, mesh=mesh)
    abstract = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    x = jax.ShapeDtypeStruct((rows, 512), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
    specs = jax.tree.map(lambda sharding: sharding.spec, placed)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(function(mesh, specs)).trace(x, jax.tree.map(abstract, w, placed))
        return traced.lower(lowering_platforms=("cuda",)).as_text()


KERNELS = [("A100", 16, "__gpu$xla.gpu.triton"), ("A100", 512, "__gpu$xla.gpu.triton"), ("H100", 512, "mosaic_gpu")]


@pytest.mark.parametrize(("gpu", "rows", "call"), KERNELS)
def test_a_program_that_xla_divides_has_no_kernels(gpu, rows, call):
    """Each device would get all weights."""
    assert call not in for_cuda(lambda mesh, specs: jint8.matmul, gpu, rows)


@pytest.mark.parametrize(("gpu", "rows", "call"), KERNELS)
def test_in_a_shard_map_the_kernels_run_on_each_devices_part(gpu, rows, call):
    def parts(mesh, specs):
        return jax.shard_map(jint8.matmul, mesh=mesh, in_specs=(P(), specs), out_specs=P(None, "model"))

    assert call in for_cuda(parts, gpu, rows)
