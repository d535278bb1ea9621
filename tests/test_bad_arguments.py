"""Wrong shapes and dtypes of every public function and layer of `jint8.linen` and `jint8.nnx`: a clear error each."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import jint8
from jint8.linen import Int8Dense, Int8DenseGeneral, Int8TransformerBlock

X = jnp.ones((2, 3, 8))
NARROW = jnp.ones((2, 3, 4))
TOKENS = jnp.array([[1, 2]])
W = jint8.quantize(jnp.ones((8, 4)))
SPLIT = jint8.quantize(jnp.ones((8, 2, 4)))
OTHER_AXIS = jint8.quantize(jnp.ones((8, 4)), contract_axes=(1,))
TABLE = jint8.quantize(jnp.ones((10, 8)), contract_axes=(1,))
LINEAR = nnx.Linear(8, 4, rngs=nnx.Rngs(0))


def linen_layer(module, x=X):
    return lambda: module.apply(module.init(jax.random.key(0), X), x)


def linen_int8(module, x, plan):
    """The module's own product, on parameters of shape [8, 4] that the plan quantizes."""
    params = jint8.quantize_params(module.init(jax.random.key(0), X), plan=plan)
    return lambda: jint8.apply(module.apply)(params, x)


# name: what is called, the error, its message
CASES = {
    "linen: apply of a module": (lambda: jint8.apply(nn.Dense(4)), TypeError, "function such as module.apply"),
    "linen: apply with no Config": (lambda: jint8.apply(len, config="vector"), TypeError, "to be a jint8.Config"),
    "linen: another k": (linen_int8(nn.Dense(4), NARROW, {"kernel": (0,)}), ValueError, "got 4 .* and 8"),
    "linen: another axis": (linen_int8(nn.Dense(4), X, {"kernel": (1,)}), ValueError, "quantized over the contracted"),
    "linen: register no module": (lambda: jint8.linen.register(int, len), TypeError, "linen module class, got"),
    "linen: register no function": (lambda: jint8.linen.register(nn.Dense, 3), TypeError, "handler to be callable"),
    "Int8Dense: no Config": (linen_layer(Int8Dense(4, config="vector")), TypeError, "jint8.Config, got str"),
    "Int8Dense: another k": (linen_layer(Int8Dense(4), NARROW), ValueError, "got 4 .* and 8"),
    "Int8DenseGeneral: no Config": (linen_layer(Int8DenseGeneral(4, config=3)), TypeError, "jint8.Config, got int"),
    "Int8DenseGeneral: another k": (linen_layer(Int8DenseGeneral((2, 2)), NARROW), ValueError, "got 4 .* and 8"),
    "Int8TransformerBlock: no Config": (linen_layer(Int8TransformerBlock(config=3)), TypeError, "jint8.Config"),
    "Int8TransformerBlock: nothing to run": (linen_layer(Int8TransformerBlock()), ValueError, "block, or num_heads"),
    "Int8TransformerBlock: another norm": (
        linen_layer(Int8TransformerBlock(num_heads=2, norm="sandwich")), ValueError, "pre or post, got 'sandwich'"
    ),
    "nnx: quantize no model": (lambda: jint8.nnx.quantize({}), TypeError, "nnx module, got dict"),
    "nnx: quantize with no Config": (lambda: jint8.nnx.quantize(LINEAR, config=3), TypeError, "jint8.Config, got int"),
    "nnx: quantize with no pattern": (lambda: jint8.nnx.quantize(LINEAR, skip=3), TypeError, "path pattern"),
    "nnx: quantize with another path": (
        lambda: jint8.nnx.quantize(LINEAR, plan={"w": (0,)}), ValueError, "attributes of modules, got w"
    ),
    "nnx: quantize with another axis": (
        lambda: jint8.nnx.quantize(LINEAR, plan={"kernel": (2,)}), ValueError, "kernel: Expected contract_axes .* 2"
    ),
    "nnx: register no module": (lambda: jint8.nnx.register(int, len), TypeError, "nnx module class, got"),
    "nnx: register no function": (lambda: jint8.nnx.register(nnx.Linear, 3), TypeError, "converter to be callable"),
    "Int8Linear: kernel of another shape": (
        lambda: jint8.nnx.Int8Linear(8, 5, kernel=W), ValueError, r"kernel of shape \(8, 5\), got \(8, 4\)"
    ),
    "Int8Linear: integer kernel": (
        lambda: jint8.nnx.Int8Linear(8, 4, kernel=jnp.ones((8, 4), int)), TypeError, "float array, got int32"
    ),
    "Int8Linear: nothing to start from": (lambda: jint8.nnx.Int8Linear(8, 4), ValueError, "kernel, or rngs"),
    "Int8Linear: another k": (lambda: jint8.nnx.Int8Linear(8, 4, kernel=W)(NARROW), ValueError, "got 4 .* and 8"),
    "Int8LinearGeneral: float kernel": (
        lambda: jint8.nnx.Int8LinearGeneral(jnp.ones((8, 4))), TypeError, "QTensor, got"
    ),
    "Int8LinearGeneral: another axis": (
        lambda: jint8.nnx.Int8LinearGeneral(OTHER_AXIS)(X), ValueError, "quantized over the contracted"
    ),
    "Int8LoRALinear: another k": (
        lambda: jint8.nnx.Int8LoRALinear(8, 4, kernel=W, lora=nnx.LoRA(8, 2, 4, rngs=nnx.Rngs(0)))(NARROW),
        ValueError, "got 4 .* and 8",
    ),
    "Int8Einsum: float kernel": (
        lambda: jint8.nnx.Int8Einsum("btd,dnh->btnh", jnp.ones((8, 2, 4))), TypeError, "QTensor, got"
    ),
    "Int8Einsum: no subscripts": (lambda: jint8.nnx.Int8Einsum(None, SPLIT)(X), ValueError, "einsum_str"),
    "Int8Einsum: another rank": (
        lambda: jint8.nnx.Int8Einsum("btd,dh->bth", SPLIT)(X), ValueError, "2 dimensions of the weight"
    ),
    "Int8Embed: float table": (lambda: jint8.nnx.Int8Embed(jnp.ones((10, 8))), TypeError, "QTensor, got"),
    "Int8Embed: float tokens": (lambda: jint8.nnx.Int8Embed(TABLE)(X), TypeError, "integers, got float32"),
    "Int8Embed: attend to another k": (lambda: jint8.nnx.Int8Embed(TABLE).attend(NARROW), ValueError, "got 4 .* and 8"),
    "nnx: sharding of a result": (
        lambda: jint8.nnx.Int8Linear(8, 4, kernel=W)(X, out_sharding="model"), TypeError, "out_sharding.*PartitionSpec"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_arguments(case):
    call, error, message = CASES[case]
    with pytest.raises(error, match=message):
        call()
