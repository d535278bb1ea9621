"""A whole decoder in one program for CPU and CUDA, exported on a machine without a GPU."""

import jax
import numpy as np
from family_files import DIRECTORY, expected

import jint8

TRITON = "__gpu$xla.gpu.triton"


def test_one_program_for_cpu_and_cuda(monkeypatch):
    monkeypatch.setenv("JINT8_NATIVE", "named")  # the exported program hasn't the library
    model = jint8.load(DIRECTORY / "llama", dtype="float32")
    tokens = expected("llama")["tokens"]
    params = {"params": model.params}
    logits = lambda params, tokens: model.model.apply(params, tokens)[0]
    exported = jint8.export(logits)(params, tokens)
    assert exported.platforms == ("cpu", "cuda")
    assert TRITON in exported.mlir_module()
    want = np.asarray(jax.jit(logits)(params, tokens))
    np.testing.assert_allclose(exported.call(params, tokens), want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_without_a_gpu_in_sight_there_are_no_kernels():
    model = jint8.load(DIRECTORY / "llama", dtype="float32")
    lowered = jax.jit(model.model.apply).lower({"params": model.params}, expected("llama")["tokens"])
    assert TRITON not in lowered.as_text()


def test_the_kernels_are_in_a_program_for_cuda_where_the_cpu_has_a_library(monkeypatch):
    """A gated network that the CPU's library would compute in one call is made of products elsewhere."""
    model = jint8.load(DIRECTORY / "llama", dtype="float32")
    tokens = expected("llama")["tokens"]
    params = {"params": model.params}

    def kernels(native):
        monkeypatch.setenv("JINT8_NATIVE", native)
        program = jint8.export(lambda params, tokens: model.model.apply(params, tokens)[0])(params, tokens)
        return program.mlir_module().count(TRITON)

    assert kernels("1") == kernels("named") > 0
