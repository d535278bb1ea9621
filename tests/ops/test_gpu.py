"""Where `jint8.matmul` takes the Pallas kernels, and programs for CUDA exported from a machine without a GPU."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import jint8
from pallas_kernels import chips

X = jnp.asarray(np.random.default_rng(0).standard_normal((4, 64)), jnp.bfloat16).at[:, 5].mul(20)
W = jnp.asarray(np.random.default_rng(1).standard_normal((32, 64)), jnp.bfloat16)
N_K = jint8.quantize(W, contract_axes=(1,))
TRITON = "__gpu$xla.gpu.triton"


def program(exported):
    if importlib.util.find_spec("flatbuffers"):  # serialization needs it; jax doesn't depend on it
        exported = jax.export.deserialize(exported.serialize())
    return exported


def uses_kernels(fun, *args, **kwargs):
    return TRITON in jint8.export(fun, **kwargs)(*args).mlir_module()


@pytest.mark.first_case
@pytest.mark.parametrize("gpu", ["A100", "RTX 4090", "H100", "H200"])
@pytest.mark.parametrize("m", [1, 64], ids=["few_rows", "many_rows"])
def test_one_program_for_cpu_and_cuda(gpu, m):
    exported = program(jint8.export(jint8.matmul, gpu=gpu)(jax.ShapeDtypeStruct((m, 64), jnp.bfloat16), N_K))
    assert exported.platforms == ("cpu", "cuda")
    assert TRITON in exported.mlir_module()
    x = jnp.tile(X[:1], (m, 1))
    np.testing.assert_array_equal(exported.call(x, N_K), jint8.matmul(x, N_K))


@pytest.mark.slow
def test_mosaic_is_in_a_program_for_hopper():
    w = jint8.quantize(jnp.ones((512, 512)), contract_axes=(1,))
    x = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)
    for gpu, implementation, found in (("H100", None, True), ("H100", "triton", False), ("A100", None, False)):
        product = functools.partial(jint8.matmul, implementation=implementation)
        exported = jint8.export(product, gpu=gpu)(x, w)
        assert ("mosaic_gpu" in exported.mlir_module()) == found, (gpu, implementation)


def test_what_the_kernels_can_not_do_is_left_to_xla():
    assert uses_kernels(jint8.matmul, X, N_K)
    assert not uses_kernels(jint8.matmul, X, jint8.quantize(W.T))  # a transpose per call costs more than they gain
    assert not uses_kernels(jint8.matmul, X, N_K, platforms=("cpu",))
    for scheme in ("absmax", "row+dec", "llm.int8-zp"):
        w = jint8.quantize(W, contract_axes=(1,), config=jint8.Config(scheme=scheme))
        assert not uses_kernels(jint8.matmul, X, w)


@pytest.mark.first_case
@pytest.mark.parametrize("m", [1, 64], ids=["few_rows", "many_rows"])
@pytest.mark.parametrize(("capability", "kernels"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_gpus_before_compute_capability_8_take_xla(monkeypatch, capability, kernels, m):
    monkeypatch.setattr(chips, "current_capability", lambda: capability)
    x = jax.ShapeDtypeStruct((m, 64), jnp.bfloat16)
    # A function of its own per case, because JAX remembers programs by function.
    assert uses_kernels(lambda x, w: jint8.matmul(x, w), x, N_K, platforms=("cuda",)) == kernels
    assert uses_kernels(lambda x, w: jint8.matmul(x, w, implementation="triton"), x, N_K, platforms=("cuda",))


@pytest.mark.parametrize("implementation", ["triton", "mosaic"])
def test_a_kernel_that_is_asked_for_says_what_it_can_not_do(implementation):
    w = jint8.quantize(W, contract_axes=(1,), config=jint8.Config(scheme="llm.int8-zp"))
    with pytest.raises(NotImplementedError, match=r"the GPU kernels can compute, got scheme 'llm\.int8-zp'"):
        jint8.matmul(X, w, implementation=implementation)


@pytest.mark.slow
def test_transforms_of_a_program_with_kernels():
    x = jnp.stack([X, -X, X[::-1]])
    bias = jnp.arange(3 * 32.0).reshape(3, 32)

    def product(x, bias):
        return jint8.matmul(x, N_K, bias=bias)

    def both(x, bias):
        nested = jax.vmap(jax.vmap(lambda row, bias: product(row[None], bias)[0], in_axes=(0, None)))
        return jax.vmap(product)(x, bias), nested(x, bias)

    exported = jint8.export(both)(x, bias)
    assert TRITON in exported.mlir_module()
    for got, want in zip(exported.call(x, bias), both(x, bias), strict=True):
        np.testing.assert_array_equal(got, want)

    gradients = jax.grad(lambda x, bias: product(x, bias).astype(jnp.float32).sum(), argnums=(0, 1))
    for got, want in zip(jint8.export(gradients)(X, bias[0]).call(X, bias[0]), gradients(X, bias[0]), strict=True):
        np.testing.assert_array_equal(got, want)


def test_outside_of_jit():
    device = AbstractDevice(device_kind="NVIDIA A100-SXM4-80GB", num_cores=108, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        y = jint8.matmul(X, N_K)  # on the CPU, which is there
    np.testing.assert_array_equal(y, jint8.matmul(X, N_K))


def test_interpreted_triton_agrees_with_xla_within_a_rounding():
    got, want = (np.asarray(jint8.matmul(X, N_K, implementation=i), np.float32) for i in ("triton", "xla"))
    np.testing.assert_allclose(got, want, atol=2**-7 * np.abs(want).max())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"platforms": ()}, "Expected platforms to be some of cpu, cuda, rocm, tpu"),
        ({"platforms": "cuda"}, "Expected platforms to be some of"),
        ({"platforms": ("gpu",)}, "Expected platforms to be some of"),
        ({"gpu": "V100"}, "Expected gpu to be one of A100, A30, .*H200.*, got 'V100'"),
    ],
)
def test_bad_arguments_of_export(arguments, message):
    with pytest.raises(ValueError, match=message):
        jint8.export(jint8.matmul, **arguments)
