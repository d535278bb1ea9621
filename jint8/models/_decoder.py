"""A decoder-only transformer that runs every family: `ModelConfig` says where they differ."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jint8._core.qtensor import QTensor, is_qtensor
from jint8._ops.fused import fits_gated_network, gated_network
from jint8._ops.layers import lookup
from jint8._ops.matmul import matmul
from jint8.models import _decode
from jint8.models._attention import Attention, Context, context, mask
from jint8.models._cache import Cache, LayerCache
from jint8.models._config import ModelConfig
from jint8.models._fused import gate_blocks, split_gate
from jint8.models._layers import ACTIVATIONS, GroupedLinear, Linear, Norm, implementation, project, softcap, weight_of
from jint8.models._rope import Rotary, rotary


class MLP(nn.Module):
    """`down(activation(gate(x)) * up(x))`, or without the gate `down(activation(up(x)))`."""

    config: ModelConfig
    dtype: DTypeLike = jnp.float32
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x: jax.Array, at: Context) -> jax.Array:
        """`x[b, s, d]` -> the same shape."""
        c = self.config
        weights = self._alone()
        if weights is not None and fits_gated_network(x, *weights, c.activation):
            blocks = gate_blocks(c.intermediate_size)
            return gated_network(x, *weights, blocks=blocks, activation=c.activation, apart=_gated_network, static=c)
        if c.gated:
            h = gated(Linear(2 * c.intermediate_size, c.mlp_bias, self.dtype, self.mesh, name="gate_up")(x), c)
        else:
            h = Linear(c.intermediate_size, c.mlp_bias, self.dtype, self.mesh, name="up")(x)
            h = ACTIVATIONS[c.activation](h)
        return Linear(c.hidden_size, c.mlp_bias, self.dtype, self.mesh, row_parallel=True, name="down")(mask(h, at))

    def _alone(self) -> tuple[Any, Any] | None:
        """The weights of a gated network that has nothing but weights, and isn't sharded."""
        params = self.variables.get("params", {})
        names = "gate_up", "down"
        if not self.config.gated or self.mesh is not None or any({*params.get(n, {})} != {"weight"} for n in names):
            return None
        return params["gate_up"]["weight"], params["down"]["weight"]


def _gated_network(config: ModelConfig, x: jax.Array, gate_up: QTensor, down: QTensor) -> list[jax.Array]:
    """`gated_network` as three steps."""
    return [matmul(gated(matmul(x, gate_up), config), down)]


class Experts(nn.Module):
    """Gated feed-forward networks of which each token goes through a few, weighted by a router."""

    config: ModelConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, at: Context) -> jax.Array:
        """`x[b, s, d]` -> the same shape."""
        c, k = self.config, self.config.experts_per_token
        rows = x.reshape(-1, x.shape[-1])  # (m, d)
        scores = Linear(c.experts, dtype=self.dtype, name="router")(rows).astype(jnp.float32)
        scores, expert = lax.top_k(scores, k)
        share = jax.nn.softmax(scores, axis=-1)  # (m, k)
        # Sort the k copies of each row by expert, so that each expert multiplies one contiguous group of rows.
        order = jnp.argsort(expert.reshape(-1))
        sizes = jnp.bincount(expert.reshape(-1), length=c.experts).astype(jnp.int32)
        grouped = rows[order // k]
        h = gated(GroupedLinear(c.experts, 2 * c.intermediate_size, self.dtype, name="gate_up")(grouped, sizes), c)
        y = GroupedLinear(c.experts, c.hidden_size, self.dtype, name="down")(h, sizes)
        # Back into the order of the rows, and the weighted sum of each row's k results.
        y = y[jnp.argsort(order)].reshape(-1, k, c.hidden_size)
        return jnp.sum(y * share[..., None], axis=1).astype(x.dtype).reshape(x.shape)


def gated(gate_up: jax.Array, config: ModelConfig) -> jax.Array:
    """`activation(gate) * up` of `gate_up[..., 2 n]` -> `[..., n]`."""
    gate, up = split_gate(gate_up)
    # Computed in the shape of the blocks. Without the barrier XLA would do the reshape first, and its CPU backend would
    # then compute the activation one element at a time.
    h = lax.optimization_barrier(ACTIVATIONS[config.activation](gate) * up)
    return h.reshape(*gate_up.shape[:-1], -1)


class Block(nn.Module):
    """Attention and feed-forward, each with a residual; the configuration says where norms are.

    Attributes:
      config: of the model.
      window: of its attention.
      dtype: of freshly made parameters.
      mesh: devices that it is sharded over.
      by_parts: never as one call of a library.
    """

    config: ModelConfig
    window: int = 0
    dtype: DTypeLike = jnp.float32
    mesh: Mesh | None = None
    by_parts: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, at: Context, angles: Rotary | None, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        """`x[b, s, d]` -> the same shape, and the cache."""
        c = self.config
        params = self.variables.get("params", {})
        if not self.by_parts and _decode.fits(c, self.mesh, params, x, at, cache):
            assert isinstance(cache, LayerCache)
            return _decode.decode(c, self.window, params, x, at, angles, cache, by_parts=_layer_by_parts)
        attention = Attention(c, self.window, self.dtype, self.mesh, name="attention")
        mlp = Experts(c, self.dtype, name="mlp") if c.experts else MLP(c, self.dtype, self.mesh, name="mlp")

        def norm(name: str, x: jax.Array) -> jax.Array:
            return Norm(c, self.dtype, name=name)(x)

        if c.norm_place == "after":
            h, cache = attention(mask(x, at), at, angles, cache)
            x = norm("attention_norm", x + h)
            return norm("mlp_norm", x + mlp(mask(x, at), at)), cache
        h, cache = attention(mask(norm("attention_norm", x), at), at, angles, cache)
        if c.parallel:
            return x + h + mlp(mask(norm("mlp_norm", x), at), at), cache
        x = x + (norm("attention_out_norm", h) if c.norm_place == "around" else h)
        h = mlp(mask(norm("mlp_norm", x), at), at)
        return x + (norm("mlp_out_norm", h) if c.norm_place == "around" else h), cache


def _layer_by_parts(static: Any, x, params, slot, first, angles, cache) -> list[jax.Array]:
    """`_decode.decode` where the library isn't: of `x[b, d]`."""
    config, window = static
    turned = None if angles is None else Rotary(*(a[:, None, None, None] for a in angles))
    at = Context(slot, first, jnp.zeros((len(x), 1), jnp.int32), None)  # positions are in the angles
    block = Block(config, window, x.dtype, by_parts=True)
    y, held = block.apply({"params": params}, x[:, None], at, turned, LayerCache(*cache))
    return [y[:, 0], *held]


class Decoder(nn.Module):
    """A decoder-only transformer of any family in `jint8.models.FAMILIES`.

    Parameters may be float arrays or, for projections, embedding and head, `QTensor`s; the same code runs either.

    Attributes:
      config: sizes and choices.
      dtype: of activations, and of freshly made parameters.
      mesh: devices that parameters and cache are sharded over, as `partition_specs` says; None is one device.
    """

    config: ModelConfig
    dtype: DTypeLike = jnp.float32
    mesh: Mesh | None = None

    def setup(self):
        c = self.config
        init, width = nn.initializers.normal(0.02), c.embedding_size or c.hidden_size
        self.embedding = weight_of(self, "embedding", init, (c.vocab_size, width))
        if c.embedding_size:
            self.project_in = Linear(c.hidden_size, dtype=self.dtype)
            self.project_out = Linear(c.embedding_size, dtype=self.dtype)
        if c.learned_positions is not None:
            size = c.max_positions + c.learned_positions
            self.positions = self.param("positions", init, (size, c.hidden_size), self.dtype)
        if c.embedding_norm:
            self.embedding_norm = Norm(c, self.dtype)
        self.layers = [self.block(i) for i in range(c.num_layers)]
        if c.final_norm:
            self.norm = Norm(c, self.dtype)
        if not c.tie_embeddings:
            self.lm_head = Linear(c.vocab_size, dtype=self.dtype, mesh=self.mesh)

    def __call__(
        self, tokens: jax.Array, at: Context | None = None, cache: list[Cache] | None = None, last: bool = False
    ) -> tuple[jax.Array, list[Cache] | None]:
        """Logits of `tokens`, and the cache with their keys and values.

        Args:
          tokens: int `[b, s]`.
          at: where they stand; None means from slot 0, without padding.
          cache: None computes without one.
          last: compute the logits of the last token only.

        Returns:
          float32 `[b, s, vocab]` (`[b, 1, vocab]` with `last`), and the cache (None without one).
        """
        at = context(tokens) if at is None else at
        x, angles = self.begin(tokens, at)
        new_cache: list[Any] = []
        for i, layer in enumerate(self.layers):
            x, layer_cache = layer(x, at, angles[self.is_local(i)], None if cache is None else cache[i])
            new_cache.append(layer_cache)
        return self.end(x, at, last), None if cache is None else new_cache

    @nn.nowrap
    def block(self, i: int) -> Block:
        """A module for layer `i`. Those of layers of the same kind compare equal: they share a compiled program."""
        window = self.config.windows[i] if self.config.windows else 0
        return Block(self.config, window, self.dtype, self.mesh, parent=None)

    @nn.nowrap
    def is_local(self, i: int) -> bool:
        """Whether layer `i` has a window, and so takes the second of the two angles that `begin` returns."""
        return bool(self.config.windows and self.config.windows[i])

    def begin(self, tokens: jax.Array, at: Context) -> tuple[jax.Array, tuple[Rotary | None, Rotary | None]]:
        """The input `x[b, s, d]` of the first layer, and rotary angles: of full layers, and of those with a window.

        `begin`, the layers and `end` make up `__call__`; `jint8._inference.forward` jits each for itself.
        """
        c = self.config
        x = embed(self.embedding, tokens).astype(self.dtype)
        if c.embedding_scale != 1:
            x = x * jnp.asarray(c.embedding_scale, x.dtype)
        if c.embedding_size:
            x = self.project_in(mask(x, at))
        if c.learned_positions is not None:
            x = x + jnp.take(self.positions, at.positions + c.learned_positions, axis=0).astype(x.dtype)
        if c.embedding_norm:
            x = self.embedding_norm(x)
        angles = None if c.rope is None else rotary(at.positions, c.rope, at.length)
        return x, (angles, angles if c.local_rope is None else rotary(at.positions, c.local_rope, at.length))

    def end(self, x: jax.Array, at: Context, last: bool) -> jax.Array:
        """Logits of `x[b, s, d]`, which comes out of the last layer."""
        c = self.config
        if last:
            x, at = x[:, -1:], at._replace(valid=None)  # padding is on the left: the last token never is
        if c.final_norm:
            x = self.norm(x)
        x = mask(x, at)
        if c.embedding_size:
            x = self.project_out(x)
        if not c.tie_embeddings:
            logits = self.lm_head(x)
        elif is_qtensor(self.embedding):
            logits = matmul(x, self.embedding, implementation=implementation(self.mesh))
        else:
            logits = project(x, self.embedding)
        return softcap(logits.astype(jnp.float32), c.logit_softcap)


def embed(embedding: jax.Array | QTensor, tokens: jax.Array) -> jax.Array:
    """Rows of the embedding for `tokens`. Of an int8 embedding only those rows are dequantized."""
    return lookup(embedding, tokens) if isinstance(embedding, QTensor) else jnp.take(embedding, tokens, axis=0)
