"""An nnx model in int8 without a changed line."""

import jax
import jax.numpy as jnp
from flax import nnx

import jint8


class Block(nnx.Module):
    """Any model of yours."""

    def __init__(self, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(8, 128, decode=False, rngs=rngs)
        self.up = nnx.Linear(128, 512, rngs=rngs)
        self.down = nnx.Linear(512, 128, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(x)
        return x + self.down(nnx.gelu(self.up(x)))


def main():
    """Quantizes and runs it; returns the relative error of the result."""
    model = Block(nnx.Rngs(0))
    int8 = jint8.nnx.quantize(model)  # a new model; the old one stays as it was
    print(jint8.memory_report(nnx.state(int8)))

    x = jax.random.normal(jax.random.key(0), (2, 16, 128))
    y = nnx.jit(lambda model, x: model(x))(int8, x)
    error = jnp.linalg.norm(y - model(x)) / jnp.linalg.norm(model(x))
    print(f"relative error: {error:.4f}")
    return float(error)


if __name__ == "__main__":
    main()
