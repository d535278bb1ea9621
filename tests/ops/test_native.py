"""The compiled library: against the oracle, against the XLA paths, in transformations, programs and processes."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from matmul_cases import CASES, EXACT, NOT_FINITE, SHAPES, VALUES

import jint8
from jint8._ops.cpu import native
from jint8._ops.cpu.compile import build_program, find_compiler

pytestmark = pytest.mark.skipif(native.kernels() is None, reason="jint8 was installed without a C++ compiler")
matmul = jax.jit(jint8.matmul, static_argnames=("config", "implementation"))
INT8_SCHEMES = ["vector", "vector-zp", "llm.int8", "llm.int8-zp"]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def check(name, config=None, dtype=jnp.float32, bias=None):
    case = CASES[name]
    config = config or jint8.Config(threshold=case.threshold)
    x = jnp.asarray(case.x, dtype)
    w = jint8.quantize(case.w.T, config=config, contract_axes=(1,))
    bias = None if bias is None else jnp.asarray(bias, dtype)
    got = matmul(x, w, bias=bias, config=config, implementation="native")
    assert (got.shape, got.dtype) == ((*case.x.shape[:-1], case.w.shape[1]), dtype)
    rows = case._replace(x=np.asarray(x, np.float32)).rows
    weight = oracle.quantize(case.w, scheme=config.scheme)
    exact, bound = oracle.matmul(rows, weight, config.scheme, config.threshold, config.outliers, bias)
    oracle.assert_close(np.asarray(got).reshape(exact.shape), exact, bound, case.bad_rows)


@pytest.mark.parametrize("name", [*SHAPES, *VALUES])
def test_equals_the_oracle(name):
    check(name)


@pytest.mark.parametrize("name", [*VALUES, NOT_FINITE])
def test_by_token(name):
    check(name, jint8.Config(outliers="token"))


@pytest.mark.parametrize("scheme", INT8_SCHEMES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=lambda d: np.dtype(d).name)
def test_schemes_and_dtypes(scheme, dtype):
    bias = np.linspace(-3, 3, VALUES["few_outliers"].w.shape[1])
    check("few_outliers", jint8.Config(scheme=scheme), dtype, bias)


@pytest.mark.parametrize("name", EXACT)
def test_integers_are_exact(name):
    case = CASES[name]
    w = jint8.quantize(case.w.T, config=jint8.Config(threshold=case.threshold), contract_axes=(1,))
    got = np.asarray(matmul(case.x, w, implementation="native"), np.float64)
    rtol = 4 * oracle.ROUNDING if "outliers" in name else 0
    np.testing.assert_allclose(got, case.x.astype(np.float64) @ case.w.astype(np.float64), rtol=rtol)


@pytest.mark.parametrize("scheme", INT8_SCHEMES)
@pytest.mark.parametrize("m", [1, 2, 5, 13])
def test_the_integers_are_those_of_xla(m, scheme):
    """Without outliers both add up the same integers, and then do the same in floating point."""
    config = jint8.Config(scheme=scheme, threshold=0)
    w = jint8.quantize(normal(70, 131), config=config, contract_axes=(1,))
    x = normal(m, 131, seed=1)
    got, expected = (matmul(x, w, config=config, implementation=name) for name in ("native", "xla_digits"))
    np.testing.assert_allclose(got, expected, rtol=3e-6 if "zp" in scheme else 2e-7, atol=1e-6)


def test_calibrated_columns():
    w = jint8.quantize(normal(24, 64), contract_axes=(1,), config=jint8.Config(outliers="static"), outliers=[3, 9])
    x = normal(4, 64, seed=1)
    x[:, [3, 9]] *= 50
    got, expected = (matmul(x, w, implementation=name) for name in ("native", "xla_digits"))
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("mode", ["batch", "token"])
def test_vmap(mode):
    config = jint8.Config(outliers=mode, threshold=3.0)
    x, layers = normal(3, 4, 40), [jint8.quantize(normal(9, 40, seed=i), contract_axes=(1,)) for i in range(3)]
    w = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    product = lambda x, w: jint8.matmul(x, w, config=config, implementation="native")
    of_x, of_w = jax.vmap(product, (0, None))(x, layers[0]), jax.vmap(product, (None, 0))(x[0], w)
    of_both = jax.jit(jax.vmap(jax.vmap(product, (0, None)), (None, 0)))(x, w)
    assert of_both.shape == (3, 3, 4, 9)
    for i in range(3):
        np.testing.assert_array_equal(of_x[i], product(x[i], layers[0]))
        np.testing.assert_array_equal(of_w[i], product(x[0], layers[i]))
        for j in range(3):
            np.testing.assert_array_equal(of_both[i, j], product(x[j], layers[i]))


def test_a_token_does_not_depend_on_its_neighbours():
    x, w = normal(9, 300), jint8.quantize(normal(50, 300), contract_axes=(1,))
    x[::2] *= 5
    together = matmul(x, w, config=jint8.Config(outliers="token"), implementation="native")
    for i in range(len(x)):
        np.testing.assert_array_equal(matmul(x[i : i + 1], w, implementation="native")[0], together[i])


def test_gradients_are_those_of_the_dequantized_weight():
    x, w = normal(3, 32), jint8.quantize(normal(8, 32), contract_axes=(1,))
    weights = np.asarray(jint8.dequantize(w), np.float64)
    got = jax.grad(lambda x: jint8.matmul(x, w, implementation="native").sum())(x)
    np.testing.assert_allclose(got, np.broadcast_to(weights.sum(0), x.shape), rtol=1e-5, atol=1e-5)


def uses_library(text):
    return native.TARGET in text


def test_who_runs_it(monkeypatch):
    monkeypatch.delenv("JINT8_NATIVE", raising=False)
    w, on_cpu = jint8.quantize(normal(8, 32), contract_axes=(1,)), jax.default_backend() == "cpu"

    def in_library(m, **options):
        product = jax.jit(lambda x, w: jint8.matmul(x, w, **options))
        return uses_library(product.lower(normal(m, 32), w).as_text())

    assert in_library(2) == on_cpu
    assert not in_library(2, implementation="xla")
    assert not in_library(2, config=jint8.Config(digits=2))
    assert in_library(17) == (on_cpu and native.kernels() == native.MATRIX_KERNELS)
    monkeypatch.setenv("JINT8_NATIVE", "1")
    assert in_library(17) == on_cpu
    monkeypatch.setenv("JINT8_NATIVE", "named")
    assert not in_library(2)
    assert in_library(17, implementation="native")


def test_an_exported_program_does_not_need_it(monkeypatch):
    monkeypatch.setenv("JINT8_NATIVE", "1")
    x, w = normal(2, 32), jint8.quantize(normal(8, 32), contract_axes=(1,))
    exported = jint8.export(jint8.matmul, platforms=("cpu",))(x, w)
    assert not uses_library(exported.mlir_module())
    np.testing.assert_allclose(exported.call(x, w), jint8.matmul(x, w, implementation="xla"), rtol=1e-6)
    asked = jax.jit(lambda x, w: jint8.matmul(x, w, implementation="native"))
    checks = [jax.export.DisabledSafetyCheck.custom_call(native.TARGET)]
    program = jax.export.export(asked, platforms=["cpu"], disabled_checks=checks)(x, w)
    assert uses_library(program.mlir_module())
    np.testing.assert_array_equal(program.call(x, w), asked(x, w))


@pytest.mark.parametrize(
    ("config", "contract_axes", "message"),
    [
        (jint8.Config(digits=2), (1,), "2 digits per activation"),
        (jint8.Config(relative=True), (1,), "a threshold relative to the token"),
        (jint8.Config(scheme="absmax"), (1,), "haven't a scale per token"),
        (jint8.Config(), (0,), "stored \\[k, n\\]"),
    ],
)
def test_what_it_cannot_compute_is_refused(config, contract_axes, message):
    w = jint8.quantize(normal(32, 32), contract_axes=contract_axes, config=config)
    with pytest.raises(NotImplementedError, match=message):
        jint8.matmul(normal(2, 32), w, implementation="native")


IN_A_PROCESS = """
import jax.numpy as jnp, numpy as np, jint8
from jint8._ops.cpu import native
from jint8._ops.cpu.compile import build_program, find_compiler
print(native.kernels())
rng = np.random.default_rng(0)
w = jint8.quantize(rng.standard_normal((37, 130)).astype(np.float32), contract_axes=(1,))
x = rng.integers(-127, 128, (7, 130)).astype(np.float32)
x[:, 0] = 127
y = jint8.matmul(x, w, config=jint8.Config(threshold=0))
np.testing.assert_array_equal(y, (x @ np.asarray(w.q, np.float32).T) * np.asarray(w.scale).T)
four = jint8.quantize(rng.standard_normal((21, 320)).astype(np.float32), contract_axes=(1,), config=jint8.Config(
    scheme="int4", grouping="oc"))
x = rng.standard_normal((6, 320)).astype(np.float32)
np.testing.assert_allclose(jint8.matmul(x, four), x @ np.asarray(jint8.dequantize(four)).T, rtol=1e-3, atol=5e-3)
x = rng.standard_normal((2, 130)).astype(np.float32)
try:
    jint8.matmul(x, w, implementation="native")
except NotImplementedError as error:
    print(error)
"""


def in_a_process(monkeypatch, **environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return subprocess.run([sys.executable, "-c", IN_A_PROCESS], capture_output=True, text=True, timeout=120)


def test_without_it(monkeypatch):
    """As on a machine where it wasn't compiled."""
    run = in_a_process(monkeypatch, JINT8_NATIVE="0")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("None\nExpected what the compiled library can compute, got no compiled library")


def test_a_library_of_another_version_is_left_out(monkeypatch):
    def refuse(*_, **__):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: the handler's API version is incompatible\nmore")

    monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse)
    native.kernels.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"installing jint8 again .*API version is incompatible\.?\)"):
            assert native.kernels() is None
        w = jint8.quantize(np.ones((4, 4), np.float32), contract_axes=(1,))
        np.testing.assert_array_equal(jint8.matmul(np.ones((2, 4), np.float32), w), np.full((2, 4), 4))
    finally:
        native.kernels.cache_clear()


@pytest.mark.parametrize("name", ["generic", "avx2", "avx-vnni", "avx512-vnni", "amx-int8", "neon-dotprod"])
def test_each_of_its_kernels(monkeypatch, name):
    run = in_a_process(monkeypatch, JINT8_CPU_KERNELS=name)
    if run.returncode and "name kernels that this processor can run" in run.stderr and name != "generic":
        pytest.skip(f"this processor can't run {name}")
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{name}\n"


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_with_sanitizers(tmp_path, sanitizers):
    """Reads behind an array, undefined arithmetic, races of threads."""
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    program = tmp_path / "check"
    flags = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-g"]
    build_program(compiler, Path(__file__).with_name("native_check.cc"), program, flags=flags)
    run = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith("generic\n")
