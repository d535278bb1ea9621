"""A program for CUDA exported from a machine without a GPU, through the package's one entry."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh

import pallas_kernels as pk
from pallas_kernels.chips import CHIPS


@pytest.mark.first_case
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("m", [1, 512], ids=["few_rows", "many_rows"])
def test_export_for_cuda(chip, m):
    device = AbstractDevice(device_kind=CHIPS[chip].device_kind, num_cores=CHIPS[chip].cores, platform="gpu")
    avals = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((m, 512), jnp.bfloat16), ((256, 512), jnp.int8), ((256,), jnp.float32))
    ]
    triton = export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        assert pk.current_chip().name == chip
        fn = jax.jit(lambda x, w, scale: pk.llm_int8_matmul(x, w, scale, backend="triton"))
        exported = export.export(fn, platforms=["cuda"], disabled_checks=[triton])(*avals)
    kernel = "_int8_matmul_few_rows_kernel" if m == 1 else "_int8_matmul_mixed_kernel"
    assert kernel in exported.mlir_module()
    if importlib.util.find_spec("flatbuffers"):  # serialization needs it; jax doesn't depend on it
        exported = export.deserialize(exported.serialize())
    assert exported.platforms == ("cuda",)
    assert [(a.shape, a.dtype) for a in exported.out_avals] == [((m, 256), jnp.bfloat16)]
