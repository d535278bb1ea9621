"""Int8Dense, Int8DenseGeneral and Int8TransformerBlock: from float parameters and from int8 ones."""

import cases
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from marks import slow_but

import jint8
from jint8.linen import Int8Dense, Int8DenseGeneral, Int8TransformerBlock

X = cases.normal(2, 3, 32, seed=1)
EXACT = jint8.Config(threshold=0.0)


class Mlp(nn.Module):
    """A user's block, with an argument of its own."""

    @nn.compact
    def __call__(self, x, scale=1.0):
        return x + scale * nn.Dense(32, name="down")(nn.gelu(nn.Dense(64, name="up")(nn.LayerNorm()(x))))


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return Int8TransformerBlock(num_heads=4, name="block", config=EXACT)(x), None


# name: int8 module, the float module with the same parameters, int8 products
MODULES = {
    "Int8Dense": (Int8Dense(8, config=EXACT), nn.Dense(8), 1),
    "Int8Dense without bias": (Int8Dense(8, use_bias=False, config=EXACT), nn.Dense(8, use_bias=False), 1),
    "Int8DenseGeneral": (Int8DenseGeneral((2, 4), config=EXACT), nn.DenseGeneral((2, 4)), 1),
    "Int8DenseGeneral, two input axes": (
        Int8DenseGeneral(8, axis=(-2, -1), config=EXACT),
        nn.DenseGeneral(8, axis=(-2, -1)),
        1,
    ),
    "block, pre-norm": (Int8TransformerBlock(num_heads=4, config=EXACT), None, 6),
    "block, post-norm": (Int8TransformerBlock(num_heads=4, norm="post", mlp_dim=48, config=EXACT), None, 6),
    "block of one's own": (Int8TransformerBlock(block=Mlp(), config=EXACT), None, 2),
    "scanned blocks": (
        nn.scan(
            nn.remat(Body), variable_axes={"params": 0}, split_rngs={"params": True}, length=3, in_axes=nn.broadcast
        )(),
        None,
        6,
    ),
}


def first(apply_fn):
    return lambda *args: jax.tree.leaves(apply_fn(*args))[0]


def arguments(name):
    return (X, None) if name == "scanned blocks" else (X,)


@pytest.mark.first_case
@pytest.mark.parametrize(
    "name", slow_but(MODULES, "Int8Dense", "Int8DenseGeneral", "block, post-norm", "scanned blocks")
)
def test_float_and_int8_parameters_give_the_same(name):
    module, float_module, products = MODULES[name]
    args = arguments(name)
    floats, int8, plan = cases.quantize_linen(module, *args, config=EXACT)
    assert len(plan) == products
    function = first(module.apply)
    assert cases.count_int8_products(function, floats, *args) == products
    assert cases.count_int8_products(function, int8, *args) == products
    got = cases.jit(function)(int8, *args)
    assert cases.relative_error(cases.jit(function)(floats, *args), got) < 1e-6
    if float_module is None:  # the same block in floating point: the scheme "none" leaves float weights alone
        in_float = first(jint8.apply(module.apply, config=jint8.Config(scheme="none")))
    else:
        in_float = lambda params, x: float_module.apply(floats, x)
    assert cases.relative_error(got, in_float(int8, *args)) < 0.05


@pytest.mark.parametrize("name", ["Int8Dense", "Int8DenseGeneral"])
def test_declares_the_parameters_of_the_float_layer(name):
    module, float_module, _ = MODULES[name]
    ours, theirs = (m.init(jax.random.key(0), X) for m in (module, float_module))
    assert jax.tree.map(jnp.array_equal, ours, theirs) == jax.tree.map(lambda _: True, theirs)


@pytest.mark.first_case
@pytest.mark.parametrize("name", ["Int8Dense", "block, pre-norm"])
def test_gradient_reaches_float_kernels_straight_through(name):
    module, _, _ = MODULES[name]
    float_module = module.clone(config=jint8.Config(scheme="none"))
    params, _, _ = cases.quantize_linen(module, X, config=EXACT)
    loss = lambda module: lambda params: jnp.sum(jnp.sin(module.apply(params, X)))
    got, want = (cases.jit(jax.grad(loss(m)))(params) for m in (module, float_module))
    flat = lambda tree: jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
    assert cases.relative_error(flat(got), flat(want)) < 0.1


@pytest.mark.first_case
@pytest.mark.parametrize("name", ["Int8Dense", "Int8DenseGeneral", "block, pre-norm"])
def test_under_apply(name):
    module, _, _ = MODULES[name]
    _, int8, _ = cases.quantize_linen(module, X, config=EXACT)
    assert jnp.array_equal(jint8.apply(module.apply)(int8, X), module.apply(int8, X))


def test_block_passes_arguments_on():
    module = Int8TransformerBlock(block=Mlp())
    params = module.init(jax.random.key(0), X)
    assert jnp.allclose(module.apply(params, X, scale=0.0), X)
    assert jnp.allclose(module.apply(params, X, 0.0), X)


def test_block_without_a_layer_that_it_could_quantize_says_so():
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("w", nn.initializers.normal(), (X.shape[-1], 8))

    module = Int8TransformerBlock(block=Own())
    params = module.init(jax.random.key(0), X)
    with pytest.warns(UserWarning, match="Int8TransformerBlock: nothing becomes int8: no layer of Own is"):
        module.apply(params, X)
    module.apply(jint8.quantize_params(params, plan={"block/w": (0,)}), X)
    Int8TransformerBlock(block=Own(), config=jint8.Config(scheme="none")).apply(params, X)


def test_mask_of_the_standard_block():
    module = Int8TransformerBlock(num_heads=4, config=jint8.Config(outliers="token"))
    params = module.init(jax.random.key(0), X)
    causal = nn.make_causal_mask(jnp.ones(X.shape[:2]))
    changed = X.at[:, -1].add(1.0)
    a, b = module.apply(params, X, causal), module.apply(params, changed, causal)
    assert jnp.array_equal(a[:, :-1], b[:, :-1])
    assert not jnp.array_equal(a[:, -1], b[:, -1])


def test_bad_blocks():
    with pytest.raises(ValueError, match="Expected a block, or num_heads"):
        Int8TransformerBlock().init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="pre or post"):
        Int8TransformerBlock(num_heads=4, norm="sandwich").init(jax.random.key(0), X)
