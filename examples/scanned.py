"""A scanned linen model: kernels [layers, k, n], one scale per layer and channel, under remat."""

import jax
import jax.numpy as jnp
from flax import linen as nn

import jint8


class Block(nn.Module):
    """One layer, with the signature that `nn.scan` wants."""

    @nn.compact
    def __call__(self, x, _):
        h = nn.gelu(nn.Dense(256, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(64, name="down")(h), None


class Model(nn.Module):
    """Twelve of them."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=12)
        return layers(name="layers")(x, None)[0]


def main():
    """Plans, quantizes and runs it; returns the relative error of the result."""
    model, x = Model(), jax.random.normal(jax.random.key(0), (2, 16, 64))
    params = model.init(jax.random.key(1), x)
    plan = jint8.plan(model.apply, params, x)  # names alone don't say which axis of a stack is the layers'
    print(plan)
    int8 = jint8.quantize_params(params, plan=plan)

    y = jax.jit(jint8.apply(model.apply))(int8, x)
    exact = model.apply(params, x)
    error = jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact)
    print(f"relative error after 12 layers: {error:.4f}")
    return float(error)


if __name__ == "__main__":
    main()
