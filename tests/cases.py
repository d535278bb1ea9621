"""Models and helpers shared by the tests of the wrappers."""

import contextlib
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np

import jint8
from jint8._ops import by_platform

# Small programs that run once: compiling them is what the tests' time goes into.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def relative_error(got, want):
    got, want = (np.asarray(jax.tree.leaves(a)[0], np.float64) for a in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def plant(x, columns=(1, 5), factor=40.0):
    """`x` with outlier feature dimensions, as LLM activations have them."""
    x = np.array(x)
    x[..., list(columns)] *= factor
    return jnp.asarray(x)


def normal(*shape, seed=0):
    """Normal float32 values, by NumPy: JAX would compile a program for each shape."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def quantize_linen(module, *args, config=jint8.Config(), seed=0, **kwargs):
    """Float variables with random biases, and int8 ones by the module's plan (tied embeddings included)."""
    key = (id(module), config, str(jax.tree.map(jnp.shape, args)), str(kwargs), seed)
    if key not in _CACHE:
        variables = randomize_biases(jit(module.init)(jax.random.key(seed), *args))
        plan = jint8.plan(module.apply, variables, *args)
        plan = plan.with_(plan.tied)
        quantize = jit(lambda variables: jint8.quantize_params(variables, plan=plan, config=config, **kwargs))
        _CACHE[key] = module, (variables, quantize(variables), plan)  # with the module, so that its id isn't reused
    return _CACHE[key][1]


_CACHE = {}


def randomize_biases(tree):
    def leaf(path, value):
        if "bias" not in jax.tree_util.keystr(path):
            return value
        return normal(*value.shape, seed=value.size).astype(value.dtype)

    return jax.tree_util.tree_map_with_path(leaf, tree)


@contextlib.contextmanager
def by_xla():
    """Products run in XLA where nobody says, as without the compiled library of the CPU: to look at programs."""
    before = os.environ.get("JINT8_NATIVE")
    os.environ["JINT8_NATIVE"] = "named"
    try:
        yield
    finally:
        del os.environ["JINT8_NATIVE"]
        if before is not None:
            os.environ["JINT8_NATIVE"] = before


def count_int8_products(function, *args):
    """dot_general equations with two int8 operands in XLA's program: a loop's body counts once."""
    with by_xla():
        program = jax.make_jaxpr(function)(*args).jaxpr
    return sum(
        eqn.primitive.name in ("dot_general", "ragged_dot_general")
        and all(v.aval.dtype == jnp.int8 for v in eqn.invars[:2])
        for eqn in equations(program)
    )


def count_float_products(function, *args):
    """dot_general equations with a floating-point operand."""
    return sum(
        eqn.primitive.name == "dot_general" and eqn.invars[0].aval.dtype != jnp.int8
        for eqn in equations(jax.make_jaxpr(function)(*args).jaxpr)
    )


def equations(jaxpr):
    """Every equation of a program, and of those inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        if eqn.primitive.name == by_platform.NAME:
            yield from equations(by_platform.by_xla(eqn).jaxpr)
            continue
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                yield from equations(getattr(inner, "jaxpr", inner))


def _is_jaxpr(value):
    return hasattr(value, "eqns")
