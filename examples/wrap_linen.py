"""A linen model in int8 without a changed line: attention, MLP and a tied embedding."""

import jax
import jax.numpy as jnp
from flax import linen as nn

import jint8


class Model(nn.Module):
    """Any model of yours."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(1000, 128, name="embed")
        x = embed(tokens)
        x = x + nn.MultiHeadDotProductAttention(8)(nn.LayerNorm()(x))
        x = x + nn.Dense(128)(nn.gelu(nn.Dense(512)(nn.LayerNorm()(x))))
        return embed.attend(nn.LayerNorm()(x))


def main():
    """Plans, quantizes and runs it; returns the relative error of the logits."""
    model, tokens = Model(), jnp.arange(32).reshape(2, 16)
    params = model.init(jax.random.key(0), tokens)

    plan = jint8.plan(model.apply, params, tokens)
    print(plan)
    int8 = jint8.quantize_params(params, plan=plan)
    print(jint8.memory_report(int8))

    logits = jax.jit(jint8.apply(model.apply))(int8, tokens)
    exact = model.apply(params, tokens)
    error = jnp.linalg.norm(logits - exact) / jnp.linalg.norm(exact)
    print(f"relative error of the logits: {error:.4f}")
    return float(error)


if __name__ == "__main__":
    main()
