"""A bidirectional transformer (BERT): features of each token instead of logits of the next one."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jint8.models._attention import Context, context, mask
from jint8.models._config import ModelConfig
from jint8.models._decoder import Block, embed
from jint8.models._layers import Norm, weight_of


class Encoder(nn.Module):
    """An encoder of the BERT family, of the same blocks as `Decoder`.

    Attributes:
      config: sizes and choices.
      dtype: of activations, and of freshly made parameters.
    """

    config: ModelConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, at: Context | None = None) -> jax.Array:
        """Features of `tokens`.

        Args:
          tokens: int `[b, s]`; padding is on the left.
          at: where they stand; None means from slot 0, without padding.

        Returns:
          `[b, s, hidden_size]`, zeros in place of padding.
        """
        c = self.config
        at = context(tokens) if at is None else at
        init = nn.initializers.normal(0.02)
        embedding = weight_of(self, "embedding", init, (c.vocab_size, c.hidden_size))
        positions = self.param("positions", init, (c.max_positions, c.hidden_size), self.dtype)
        kinds = self.param("token_types", init, (c.token_types, c.hidden_size), self.dtype)
        x = embed(embedding, tokens).astype(self.dtype)
        x = x + jnp.take(positions, at.positions, axis=0).astype(x.dtype) + kinds[0].astype(x.dtype)
        x = Norm(c, self.dtype, name="embedding_norm")(x)
        for i in range(c.num_layers):
            x, _ = Block(c, dtype=self.dtype, name=f"layers_{i}")(x, at, None, None)
        return mask(x, at)
