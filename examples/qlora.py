"""QLoRA: low-rank matrices train on a decoder in four bits, which stays as it is (arXiv 2305.14314)."""

import jax
import jax.numpy as jnp

import jint8
from jint8.models import Decoder, model_config

CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
}
RANK = 4


def is_weight(tree):
    """Whether a part of the tree is a projection in four bits, with its weight beside a place for factors."""
    return isinstance(tree.get("weight"), jint8.QTensor)


def new_factors(base, key):
    """`lora_a[r, k]` and `lora_b[n, r]` for each projection: random and 0, so that their product is 0 at first."""
    if is_weight(base):
        n, k = base["weight"].shape
        return {"lora_a": jax.random.normal(key, (RANK, k)) / k**0.5, "lora_b": jnp.zeros((n, RANK))}
    parts = {name: part for name, part in base.items() if isinstance(part, dict)}
    keys = jax.random.split(key, max(len(parts), 1))
    return {name: new_factors(part, one) for (name, part), one in zip(parts.items(), keys, strict=False)}


def with_factors(base, factors):
    """The parameters with factors beside their weights, where the decoder finds them."""
    joined = {
        name: with_factors(part, factors[name]) if isinstance(part, dict) else part for name, part in base.items()
    }
    return joined | (factors if is_weight(base) else {})


def main(steps=60, rate=0.5):
    """Trains the factors to continue sequences that count up by threes; returns the losses."""
    decoder = Decoder(model_config(CONFIG))
    tokens = (jnp.arange(8)[:, None] * 7 + jnp.arange(24) * 3) % CONFIG["vocab_size"]
    floats = jax.jit(decoder.init)(jax.random.key(0), tokens)["params"]
    base = jint8.quantize_params(floats, config=jint8.Config(scheme="int4", group=32, grouping="oc"))
    print(jint8.memory_report(base))

    @jax.jit
    def step(factors, base):
        def loss_of(factors):
            logits = decoder.apply({"params": with_factors(base, factors)}, tokens[:, :-1])[0]
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
            return -jnp.mean(chosen)

        loss, gradients = jax.value_and_grad(loss_of)(factors)
        return jax.tree.map(lambda value, slope: value - rate * slope, factors, gradients), loss

    factors, losses = new_factors(base, jax.random.key(1)), []
    for _ in range(steps):
        factors, loss = step(factors, base)
        losses.append(float(loss))
    print(f"loss: {losses[0]:.4f} at the start, {losses[-1]:.4f} after {steps} steps")
    return losses


if __name__ == "__main__":
    main()
