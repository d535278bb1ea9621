"""LoRA on an int8 base: the base stays int8 and fixed, only the low-rank matrices train."""

import jax
import jax.numpy as jnp
from flax import nnx

import jint8


class Model(nnx.Module):
    """A two-layer network with LoRA on both layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.LoRALinear(32, 128, lora_rank=4, rngs=rngs)
        self.down = nnx.LoRALinear(128, 32, lora_rank=4, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


@nnx.jit
def step(model, x, target, rate):
    """One step of gradient descent on the LoRA parameters; returns the loss before it."""

    def loss_fn(model):
        return jnp.mean((model(x) - target) ** 2)

    loss, gradients = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    lora = nnx.state(model, nnx.LoRAParam)
    nnx.update(model, jax.tree.map(lambda p, g: p - rate * g, lora, gradients))
    return loss


def main(steps=100):
    """Trains it towards another model's outputs; returns the losses."""
    model = jint8.nnx.quantize(Model(nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (64, 32))
    target = Model(nnx.Rngs(2))(x)
    losses = [float(step(model, x, target, 0.3)) for _ in range(steps)]
    print(f"loss: {losses[0]:.4f} at the start, {losses[-1]:.4f} after {steps} steps")
    assert model.up.kernel.get_value().q.dtype == jnp.int8
    return losses


if __name__ == "__main__":
    main()
