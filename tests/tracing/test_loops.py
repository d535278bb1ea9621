"""Int8 weights inside of loops and conditions: the same steps, one after the other, by `jint8.matmul`."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import jint8
from jint8._tracing.substitute import UnsupportedUse, with_int8

X = cases.normal(4, 16, seed=1)
W = cases.normal(3, 16, 16) / 4
STACK = jint8.quantize(W, contract_axes=(1,))  # stored as it is: [layers, k, n]
LAST = jint8.quantize(W.swapaxes(1, 2), contract_axes=(2,))  # [layers, n, k]
EACH = [jint8.quantize(w, contract_axes=(0,)) for w in W]


def through(*layers):
    x = X
    for w in layers:
        x = jnp.tanh(jint8.matmul(x, w))
    return x


def step(c, w):
    return jnp.tanh(c @ w), None


def until_three(w):
    return lax.while_loop(lambda c: c[1] < 3, lambda c: (step(c[0], w)[0], c[1] + 1), (X, 0))[0]


def carried(w):
    return lax.scan(lambda c, _: ((step(c[0], c[1])[0], c[1]), None), (X, w), None, length=3)[0][0]


def carried_until(w):
    return lax.while_loop(lambda c: c[2] < 3, lambda c: (step(c[0], c[1])[0], c[1], c[2] + 1), (X, w, 0))[0]


def condition_with_weight(w):
    return lax.while_loop(lambda c: (c[0] @ w).sum() > jnp.inf, lambda c: c, (X, 0))[0]


# name: the code for a float weight, the weights, the same by `jint8.matmul`
LOOPS = {
    "closed over by scan": (lambda w: lax.scan(lambda c, _: step(c, w), X, None, length=3)[0], 0, [0, 0, 0]),
    "carried by scan": (carried, 0, [0, 0, 0]),
    "scanned": (lambda w: lax.scan(step, X, w)[0], STACK, [0, 1, 2]),
    "scanned, contracted last": (lambda w: lax.scan(lambda c, w: step(c, w.T), X, w)[0], LAST, [0, 1, 2]),
    "scanned backwards": (lambda w: lax.scan(step, X, w, reverse=True)[0], STACK, [2, 1, 0]),
    "scanned, unrolled": (lambda w: lax.scan(step, X, w, unroll=3)[0], STACK, [0, 1, 2]),
    "scan in scan": (
        lambda w: lax.scan(lambda c, _: (lax.scan(step, c, w)[0], None), X, None, length=2)[0],
        STACK,
        [0, 1, 2, 0, 1, 2],
    ),
    "fori_loop": (lambda w: lax.fori_loop(0, 3, lambda _, c: step(c, w)[0], X), 0, [0, 0, 0]),
    "fori_loop that picks": (lambda w: lax.fori_loop(0, 3, lambda i, c: step(c, w[i])[0], X), STACK, [0, 1, 2]),
    "while_loop": (until_three, 0, [0, 0, 0]),
    "carried by while_loop": (carried_until, 0, [0, 0, 0]),
    "in the condition of while_loop": (condition_with_weight, 0, []),
    "map": (lambda w: lax.map(lambda row: step(row[None], w)[0][0], X), 0, [0]),
    "cond, taken": (lambda w: lax.cond(jnp.sum(X**2) > 0, lambda: step(X, w)[0], lambda: X), 0, [0]),
    "cond, not taken": (lambda w: lax.cond(jnp.sum(X**2) < 0, lambda: step(X, w)[0], lambda: X), 0, []),
    "switch": (lambda w: lax.switch(1, [lambda: X, lambda: step(step(X, w[0])[0], w[2])[0]]), STACK, [0, 2]),
    "handed through cond": (
        lambda w: step(X, lax.cond(jnp.sum(X**2) > 0, lambda w: (w, 1), lambda w: (w, 2), w)[0])[0], 0, [0]
    ),
}  # fmt: skip


@pytest.mark.first_case
@pytest.mark.parametrize("name", LOOPS)
def test_the_same_steps(name):
    function, w, layers = LOOPS[name]
    w = EACH[0] if isinstance(w, int) else w
    run = lambda w: with_int8(lambda floats: function(floats["w"]), {"w": w})
    want = through(*(EACH[i] for i in layers))
    np.testing.assert_allclose(run(w), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(cases.jit(run)(w), want, rtol=1e-5, atol=1e-6)


REFUSED = {
    "changed by a scan": lambda w: lax.scan(lambda c, _: (c.T, c[0]), w, None, length=2)[1],
    "changed by a while_loop": lambda w: lax.while_loop(lambda c: c[1] < 2, lambda c: (c[0].T, c[1] + 1), (w, 0))[0],
    "stacked up": lambda w: lax.scan(lambda c, _: (c, w), X, None, length=2)[1],
    "chosen": lambda w: lax.cond(jnp.sum(X) > 0, lambda: w, lambda: w.T),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    with pytest.raises(UnsupportedUse, match=r"Expected a (loop|scan|condition)"):
        with_int8(lambda floats: REFUSED[name](floats["w"]), {"w": EACH[0]})


@jax.custom_vjp
def sine(x):
    return jnp.sin(x)


sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (3 * g * jnp.cos(x),))  # not the derivative, so that one sees it


class Loop(nn.Module):
    endless: bool = True

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.lecun_normal(), (3, 16, 16))
        x = lax.scan(lambda c, w: (sine(c @ w), None), x, w)[0]
        if not self.endless:
            return x
        return lax.while_loop(lambda c: c[1] < 2, lambda c: (jnp.tanh(c[0] @ w[1]), c[1] + 1), (x, 0))[0]


def test_planned_is_what_runs():
    module = Loop()
    variables, int8, plan = cases.quantize_linen(module, X)
    assert dict(plan) == {"w": (1,)}
    assert cases.relative_error(jint8.apply(module.apply)(int8, X), module.apply(variables, X)) < 0.05


def test_gradients_of_own_rules():
    """A custom derivative inside of a scan stays what it is."""
    function = lambda x, w: lax.scan(lambda c, w: (sine(c @ w), None), x, w)[0].sum()
    got = jax.grad(lambda x: with_int8(lambda floats: function(x, floats["w"]), {"w": STACK}))(X)
    want = jax.grad(lambda x: function(x, STACK.dequantize()))(X)
    assert cases.relative_error(got, want) < 0.05


def test_calibrated_columns_in_a_scan():
    """Statistics of the activations of each layer come out of the loop, and the columns that they name go in."""
    module, x = Loop(endless=False), cases.plant(X)
    variables = cases.quantize_linen(module, X)[0]
    outliers = jint8.calibrate(module.apply, variables, [x])
    int8 = jint8.quantize_params(variables, plan=jint8.plan(module.apply, variables, x), outliers=outliers)
    assert cases.relative_error(jint8.apply(module.apply)(int8, x), module.apply(variables, x)) < 0.05


def test_nothing_is_observed_in_a_while_loop():
    variables = cases.quantize_linen(Loop(), X)[0]
    with pytest.raises(TypeError, match="got a while_loop"):
        jint8.calibrate(Loop().apply, variables, [X])
