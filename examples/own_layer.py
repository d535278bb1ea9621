"""A layer of one's own runs in int8 as it is; five lines teach jint8 a layer that changes its weight."""

import jax
import jax.numpy as jnp
from flax import linen as nn

import jint8


class Heads(nn.Module):
    """A projection to attention heads, written with einsum on a parameter: needs nothing."""

    heads: int
    size: int

    @nn.compact
    def __call__(self, x):
        shape = (self.heads, x.shape[-1], self.size)
        return jnp.einsum("btd,ndh->btnh", x, self.param("w", nn.initializers.lecun_normal(), shape))


class Gained(nn.Module):
    """A projection whose weight is multiplied by a gain per output: needs its float values, unless it is taught."""

    features: int

    @nn.compact
    def __call__(self, x):
        gain = self.param("gain", nn.initializers.ones, (self.features,))
        return x @ (gain * self.param("w", nn.initializers.lecun_normal(), (x.shape[-1], self.features)))


@jint8.linen.register(Gained)
def gained(module, x):
    """Runs instead of `Gained.__call__` where `w` is int8."""
    return jint8.linen.param(module, "gain") * jint8.matmul(x, jint8.linen.param(module, "w"))


class Model(nn.Module):
    """Both of them."""

    @nn.compact
    def __call__(self, x):
        h = Heads(heads=4, size=16, name="heads")(x)
        return Gained(64, name="out")(h.reshape(*x.shape[:-1], 64))


def main():
    """Plans, quantizes and runs it; returns the relative error of the result."""
    model, x = Model(), jax.random.normal(jax.random.key(0), (2, 8, 64))
    params = model.init(jax.random.key(1), x)
    plan = jint8.plan(model.apply, params, x).with_({"out/w": (0,)})  # the plan alone would leave out what is changed
    int8 = jint8.quantize_params(params, plan=plan)

    y = jax.jit(jint8.apply(model.apply))(int8, x)
    exact = model.apply(params, x)
    error = jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact)
    print(f"relative error: {error:.4f}")
    return float(error)


if __name__ == "__main__":
    main()
