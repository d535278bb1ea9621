"""A layer of one's own: five lines teach jint8 to multiply its weight in int8."""

import jax
import jax.numpy as jnp
from flax import linen as nn

import jint8


class Heads(nn.Module):
    """A projection to attention heads, written with einsum on a parameter."""

    heads: int
    size: int

    @nn.compact
    def __call__(self, x):
        shape = (self.heads, x.shape[-1], self.size)
        return jnp.einsum("btd,ndh->btnh", x, self.param("w", nn.initializers.lecun_normal(), shape))


@jint8.linen.register(Heads)
def heads(module, x):
    """Runs instead of `Heads.__call__` where `w` is int8."""
    return jint8.einsum("btd,ndh->btnh", x, jint8.linen.param(module, "w"))


def main():
    """Plans, quantizes and runs it; returns the relative error of the result."""
    model, x = Heads(heads=4, size=16), jax.random.normal(jax.random.key(0), (2, 8, 64))
    params = model.init(jax.random.key(1), x)
    int8 = jint8.quantize_params(params, plan=jint8.plan(model.apply, params, x))

    y = jax.jit(jint8.apply(model.apply))(int8, x)
    exact = model.apply(params, x)
    error = jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact)
    print(f"relative error: {error:.4f}")
    return float(error)


if __name__ == "__main__":
    main()
