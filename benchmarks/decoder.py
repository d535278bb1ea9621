"""Stage 5: a decoder of Llama-8B's shape with random weights and planted outliers, in int8 and in bf16."""

import functools
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

import pallas_kernels as pk


class Shape(NamedTuple):
    """Sizes of the model; q, k, v and gate, up are one projection each, in both versions."""

    layers: int = 32
    width: int = 4096
    heads: int = 32
    kv_heads: int = 8
    hidden: int = 14336
    vocabulary: int = 128256

    def projections(self) -> dict[str, tuple[int, int]]:
        head = self.width // self.heads
        return {
            "qkv": (self.width, (self.heads + 2 * self.kv_heads) * head),
            "out": (self.width, self.width),
            "gate_up": (self.width, 2 * self.hidden),
            "down": (self.hidden, self.width),
        }


TOY = Shape(layers=2, width=64, heads=4, kv_heads=2, hidden=96, vocabulary=80)


def init(shape: Shape, *, int8: bool) -> dict:
    """Random weights; norm gains that make six dimensions of every layer outliers."""
    gain = jnp.ones(shape.width, jnp.bfloat16).at[jnp.arange(6) * (shape.width // 7)].set(30.0)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def weights(key, k, n):
        if not int8:
            return jax.random.normal(key, (n, k), jnp.bfloat16) * k**-0.5
        q = jax.random.randint(key, (n, k), -127, 128, jnp.int8)
        return q, jnp.full(n, k**-0.5 / 73, jnp.float32)

    keys = iter(jax.random.split(jax.random.key(0), 4 * shape.layers + 2))
    layers = [
        {name: weights(next(keys), *size) for name, size in shape.projections().items()} for _ in range(shape.layers)
    ]
    embedding = jax.random.normal(next(keys), (shape.vocabulary, shape.width), jnp.bfloat16)
    head = jax.random.normal(next(keys), (shape.vocabulary, shape.width), jnp.bfloat16)
    return {"embedding": embedding, "head": head, "gain": gain, "layers": layers}


def _project(x, w, interpret):
    """x bfloat16[b, s, k] by bfloat16[n, k] or (int8[n, k], scale)."""
    b, s, k = x.shape
    if not isinstance(w, tuple):
        return jnp.einsum("bsk,nk->bsn", x, w)
    return pk.llm_int8_matmul(x.reshape(b * s, k), *w, threshold=6.0, interpret=interpret).reshape(b, s, -1)


def _norm(x, gain):
    x = x.astype(jnp.float32)
    return (x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * gain).astype(jnp.bfloat16)


@functools.partial(jax.jit, static_argnames=("shape", "interpret"))
def _layer(x, layer, gain, cache, start, *, shape, interpret):
    b, s, _ = x.shape
    head, groups = shape.width // shape.heads, shape.heads // shape.kv_heads
    qkv = _project(_norm(x, gain), layer["qkv"], interpret)
    q, kv = jnp.split(qkv, [shape.width], axis=-1)
    q = q.reshape(b, s, shape.kv_heads, groups, head)
    kv = kv.reshape(b, s, 2, shape.kv_heads, head)
    cache = jax.lax.dynamic_update_slice(cache, kv, (0, start, 0, 0, 0))
    scores = jnp.einsum("bsgrd,btgd->bgrst", q, cache[:, :, 0], preferred_element_type=jnp.float32) * head**-0.5
    seen = jnp.arange(cache.shape[1])[None, :] <= start + jnp.arange(s)[:, None]
    attention = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1).astype(jnp.bfloat16)
    mixed = jnp.einsum("bgrst,btgd->bsgrd", attention, cache[:, :, 1]).reshape(b, s, shape.width)
    x = x + _project(mixed, layer["out"], interpret)
    gate, up = jnp.split(_project(_norm(x, gain), layer["gate_up"], interpret), 2, axis=-1)
    return x + _project(jax.nn.silu(gate) * up, layer["down"], interpret), cache


@functools.partial(jax.jit, static_argnames=("shape", "interpret"), donate_argnums=2)
def step(weights, tokens, caches, start, *, shape, interpret):
    """tokens int32[b, s] -> next tokens int32[b, 1], caches. Layers are unrolled: a scan would copy their weights."""
    x = weights["embedding"][tokens]
    new = []
    for layer, cache in zip(weights["layers"], caches, strict=True):
        x, cache = _layer(x, layer, weights["gain"], cache, start, shape=shape, interpret=interpret)
        new.append(cache)
    logits = _norm(x[:, -1:], jnp.ones_like(weights["gain"])) @ weights["head"].T
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), new


def run(*, toy: bool) -> Iterator[dict]:
    """Prefill and decode tokens per second for batches 1, 8 and 32, weight bytes and peak memory, int8 against bf16."""
    shape = TOY if toy else Shape()
    prompt, new_tokens = (4, 2) if toy else (512, 64)
    result: dict[str, dict] = {"shape": shape._asdict(), "prompt": {"tokens": prompt}}
    for kind in ("int8", "bf16"):
        weights = init(shape, int8=kind == "int8")
        result[kind] = {"weight_bytes": sum(a.nbytes for a in jax.tree.leaves(weights))}
        for batch in (1,) if toy else (1, 8, 32):
            head = shape.width // shape.heads
            size = (batch, prompt + new_tokens, 2, shape.kv_heads, head)

            def prefill(size=size, batch=batch, weights=weights):
                caches = [jnp.zeros(size, jnp.bfloat16) for _ in range(shape.layers)]
                tokens = jnp.ones((batch, prompt), jnp.int32)
                return step(weights, tokens, caches, jnp.int32(0), shape=shape, interpret=toy)

            jax.block_until_ready(prefill())  # compiles
            start = time.perf_counter()
            token, caches = jax.block_until_ready(prefill())
            seconds = time.perf_counter() - start
            token, caches = step(weights, token, caches, jnp.int32(prompt), shape=shape, interpret=toy)  # compiles
            jax.block_until_ready(token)
            begin = time.perf_counter()
            for i in range(1, new_tokens):
                token, caches = step(weights, token, caches, jnp.int32(prompt + i), shape=shape, interpret=toy)
            jax.block_until_ready(token)
            result[kind][f"batch={batch}"] = {
                "prefill_tokens_per_s": batch * prompt / seconds,
                "decode_tokens_per_s": batch * (new_tokens - 1) / (time.perf_counter() - begin),
            }
            stats = jax.devices()[0].memory_stats() or {}
            result[kind]["peak_bytes_so_far"] = stats.get("peak_bytes_in_use")
            yield result
            del caches, token
        del weights
