"""What `jint8.nnx.quantize` leaves in floating point: said in one warning, with the reason, unless it was meant."""

import cases
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge

import jint8

X = cases.normal(2, 32, seed=1)
NOTHING = "jint8.nnx.quantize: nothing becomes int8: "
STAYS = "jint8.nnx.quantize: these weights stay in floating point: "
MASKED = "masked: used in two ways: contracted over axes \\(0,\\); elementwise"


class Own(nnx.Module):
    """A product that no converter knows, and a parameter that isn't multiplied."""

    def __init__(self, rngs, features=32):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (32, features)))
        self.position = nnx.Param(jnp.ones((2, 32)))

    def __call__(self, x):
        return (x + self.position[...]) @ self.kernel[...]


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(32, name="b")(nn.relu(nn.Dense(32, name="a")(x)))


class Masked(nnx.Module):
    def __init__(self, rngs):
        self.masked = nnx.Param(jax.random.normal(rngs.params(), (32, 32)))
        self.plain = nnx.Linear(32, 32, rngs=rngs)

    def __call__(self, x):
        return self.plain(x @ self.masked[...] + (self.masked[...] ** 2).sum())


class WithHead(nnx.Module):
    def __init__(self, rngs):
        self.lm_head = nnx.Linear(32, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(32, rngs=rngs)

    def __call__(self, x):
        return self.lm_head(self.norm(x))


class Convolution(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(32, 32, (3,), rngs=rngs)

    def __call__(self, x):
        return self.conv(x)


def linear(rngs):
    return nnx.Linear(32, 32, rngs=rngs)


def in_linen(rngs):
    return bridge.ToNNX(nn.Dense(32), rngs=rngs).lazy_init(X)


# name: model, arguments of quantize, what is said
SAID = {
    "layers that aren't known": (
        lambda r: nnx.Sequential(Own(r), Own(r)), (), {},
        NOTHING + r"layers/\*/kernel \(2 times\): Own isn't a layer that jint8 knows. With example inputs,",
    ),
    "a layer beside one that is known": (
        lambda r: nnx.Sequential(linear(r), Own(r)), (), {}, STAYS + "layers/1/kernel: Own isn't a layer",
    ),
    "a linen module": (
        lambda r: nnx.Sequential(linear(r), in_linen(r)), (), {}, STAYS + "layers/1/kernel: ToNNX isn't a layer",
    ),
    "linen modules below one": (
        lambda r: bridge.ToNNX(Linen(), rngs=r).lazy_init(X), (), {},
        NOTHING + "a/kernel: ToNNX isn't a layer that jint8 knows; b/kernel: ToNNX isn't",
    ),
    "a head alone": (
        WithHead, (), {}, NOTHING + r"output heads stay in .* unless include= names them \(lm_head/kernel\)",
    ),
    "a head alone, traced": (WithHead, (X,), {}, NOTHING + r"output heads stay .*\(lm_head/kernel\)"),
    "no weight": (lambda r: nnx.LayerNorm(32, rngs=r), (), {}, NOTHING + "no layer has a weight that jint8 knows"),
    "no weight, traced": (lambda r: nnx.LayerNorm(32, rngs=r), (X,), {}, NOTHING + "no weight is multiplied. skip="),
    "a convolution, traced": (Convolution, (X,), {}, NOTHING + "conv/kernel: convolution. skip="),
    "two uses, traced": (Masked, (X,), {}, STAYS + MASKED),
    "an empty plan": (linear, (), {"plan": {}}, NOTHING + "the plan names none of the weights"),
    "include of what the plan skips": (
        lambda r: nnx.Sequential(linear(r), Own(r)), (),
        {
            "plan": jint8.Plan({"layers/0/kernel": (0,)}, skipped={"layers/1/kernel": "left out"}),
            "include": "layers/1/kernel",
        },
        STAYS + "layers/1/kernel: left out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_said_once(name):
    make, inputs, options, expected = SAID[name]
    model = make(nnx.Rngs(0))
    with pytest.warns(UserWarning, match=expected) as said:
        jint8.nnx.quantize(model, *inputs, **options)
    assert len(said) == 1
    assert said[0].filename == __file__


# name: model, arguments of quantize
SILENT = {
    "known layers": (linear, (), {}),
    "an unknown layer, traced": (Own, (X,), {}),
    "a linen module, traced": (in_linen, (X,), {}),
    "all skipped": (linear, (), {"skip": "*"}),
    "all skipped, traced": (linear, (X,), {"skip": "*"}),
    "an unknown layer skipped": (lambda r: nnx.Sequential(linear(r), Own(r)), (), {"skip": "layers/1"}),
    "a skipped weight with two uses": (Masked, (X,), {"skip": "masked"}),
    "the scheme none": (Own, (), {"config": jint8.Config(scheme="none")}),
    "norms, convolutions and a head beside a known layer": (
        lambda r: nnx.Sequential(linear(r), WithHead(r), Convolution(r), nnx.Embed(8, 8, rngs=r)), (), {},
    ),
    "LoRA": (lambda r: nnx.LoRALinear(32, 32, lora_rank=4, rngs=r), (), {}),
    "LoRA, traced": (lambda r: nnx.LoRALinear(32, 32, lora_rank=4, rngs=r), (X,), {}),
    "int8 already": (lambda r: jint8.nnx.quantize(linear(r)), (), {}),
    "int8 already, traced": (lambda r: jint8.nnx.quantize(linear(r)), (X,), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", SILENT)
def test_silent(name):
    """Every warning is an error in these tests."""
    make, inputs, options = SILENT[name]
    jint8.nnx.quantize(make(nnx.Rngs(0)), *inputs, **options)
