"""Linen layers that no handler knows: their own code runs, with its products in int8."""

import cases
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import jint8

X = cases.normal(2, 3, 32, seed=1)
TOKENS = jnp.array([[1, 2, 3], [4, 5, 6]])
EXACT = jint8.Config(threshold=0.0)  # one int8 product per layer on every path
INIT = nn.initializers.lecun_normal()


class Heads(nn.Module):
    """A compact layer that calls einsum on a parameter."""

    @nn.compact
    def __call__(self, x):
        return jnp.einsum("btd,ndh->btnh", x, self.param("w", INIT, (4, 32, 8)))


class Transposed(nn.Module):
    """A kernel [out, in], transposed and cast before a product of its own dtype."""

    @nn.compact
    def __call__(self, x):
        kernel = jnp.asarray(self.param("kernel", INIT, (8, 32)).transpose(), jnp.bfloat16)
        contract = (((x.ndim - 1,), (0,)), ((), ()))
        return jax.lax.dot_general(x.astype(jnp.bfloat16), kernel, contract)


class InSetup(nn.Module):
    """Declared in setup(), where linen compares shapes; one of them in a dictionary."""

    def setup(self):
        self.up = self.param("up", INIT, (32, 64))
        self.rest = {"down": self.param("down", INIT, (64, 32))}

    def __call__(self, x):
        return self.project(nn.gelu(x @ self.up))

    def project(self, x):
        return x @ self.rest["down"]


class Gated(nn.Module):
    """Two halves of one parameter, a standard layer below, and state."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", INIT, (2, 32, 64))
        y = nn.gelu(x @ w[0]) * (x @ w[1])
        calls = self.variable("state", "calls", lambda: jnp.zeros(()))
        if self.is_mutable_collection("state"):
            calls.value += 1
        self.sow("intermediates", "gate", y)
        return nn.Dense(32, name="down")(y)


class Sharing(nn.Module):
    """The inner layer's parameters lie directly below this one's."""

    @nn.compact
    def __call__(self, x):
        inner = Heads()
        nn.share_scope(self, inner)
        return inner(x) + 1


class Overriding(nn.Dense):
    """Has a handler's class as its base, but not its code."""

    @nn.compact
    def __call__(self, inputs):
        return 2 * (inputs @ self.param("kernel", self.kernel_init, (32, self.features)))


class Tied(nn.Module):
    """A tied embedding without nn.Embed."""

    def setup(self):
        self.table = self.param("table", INIT, (40, 32))

    def __call__(self, tokens):
        return self.table[tokens] @ self.table.T


class Curious(nn.Module):
    """Looks attributes up by itself."""

    @nn.compact
    def __call__(self, x):
        return Heads(name="inner")(x) * self.scale

    def __getattr__(self, name):
        if name == "scale":
            return 2.0
        return super().__getattr__(name)


class Boxed(nn.Module):
    def setup(self):
        self.w = self.param("w", nn.with_logical_partitioning(INIT, ("out", "in")), (8, 32))

    def __call__(self, x):
        return x @ self.w.T


def body(layer):
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            return x + layer(name="inner")(x).reshape(x.shape), None

    return Body


def scanned(layer, axis=0):
    return nn.scan(body(layer), variable_axes={"params": axis}, split_rngs={"params": True}, length=3)()


# name: module, argument, int8 products in the program
LAYERS = {
    "einsum": (Heads(), X, 1),
    "transposed and cast": (Transposed(), X, 1),
    "in setup": (InSetup(), X, 2),
    "halves and a standard layer": (Gated(), X, 3),
    "share_scope": (Sharing(), X, 1),
    "overridden method": (Overriding(8), X, 1),
    "tied": (Tied(), TOKENS, 1),
    "own __getattr__": (Curious(), X, 1),
    "boxed": (Boxed(), X, 1),
    "remat": (nn.remat(Heads)(), X, 1),
    "jit": (nn.jit(InSetup)(), X, 2),
    "vmap": (nn.vmap(Heads, variable_axes={"params": 0}, split_rngs={"params": True})(), X[None], 1),
    "scan": (scanned(Heads), X, 1),
    "scan, axis 1": (scanned(InSetup, 1), X, 2),
    "scan of remat": (scanned(nn.remat(Heads), -1), X, 1),
}


def outputs(module):
    return lambda variables, x: jax.tree.leaves(jint8.apply(module.apply)(variables, x))[0]


@pytest.mark.first_case
@pytest.mark.parametrize("name", LAYERS)
def test_int8_products_and_error(name):
    module, x, products = LAYERS[name]
    floats, int8, _ = cases.quantize_linen(module, x, config=EXACT)
    assert cases.count_int8_products(outputs(module), int8, x) == products
    in_float = cases.count_float_products(module.apply, floats, x)
    assert cases.count_float_products(outputs(module), int8, x) == in_float - products
    got, want = cases.jit(outputs(module))(int8, x), jax.tree.leaves(cases.jit(module.apply)(floats, x))[0]
    assert got.dtype == want.dtype
    assert cases.relative_error(got, want) < 0.02


def test_planted_outliers():
    module, x = Heads(), cases.plant(X)
    floats, int8, _ = cases.quantize_linen(module, x)
    want = module.apply(floats, x)
    run = cases.jit(jint8.apply(module.apply))
    error, without = (cases.relative_error(run(jint8.with_config(int8, c), x), want) for c in (jint8.Config(), EXACT))
    assert 2 * error < without


def test_another_method():
    module, x = InSetup(), cases.normal(2, 64, seed=2)
    floats, int8, _ = cases.quantize_linen(module, X, config=EXACT)
    got = cases.jit(lambda int8: jint8.apply(module.apply)(int8, x, method="project"))(int8)
    assert cases.relative_error(got, module.apply(floats, x, method="project")) < 0.02


def test_state_is_kept():
    module = Gated()
    _, int8, _ = cases.quantize_linen(module, X, config=EXACT)
    apply = cases.jit(lambda int8: jint8.apply(module.apply)(int8, X, mutable=["state", "intermediates"]))
    _, state = apply(int8)
    assert state["state"]["calls"] == 2  # one of them is init's
    assert state["intermediates"]["gate"][0].shape == (2, 3, 64)


def test_the_callers_parameters_are_untouched():
    module = InSetup()
    _, int8, _ = cases.quantize_linen(module, X, config=EXACT)
    before = jax.tree.leaves(int8)
    jax.eval_shape(lambda x: jint8.apply(module.apply)(int8, x), X)
    assert all(a is b for a, b in zip(before, jax.tree.leaves(int8), strict=True))


def test_gradient_with_respect_to_inputs():
    module = Heads()
    floats, int8, _ = cases.quantize_linen(module, X, config=EXACT)
    gradient = lambda apply_fn: cases.jit(jax.grad(lambda x, params: jnp.sin(apply_fn(params, x)).sum()))
    got, want = gradient(jint8.apply(module.apply))(X, int8), gradient(module.apply)(X, floats)
    assert cases.relative_error(got, want) < 0.05
