"""What `jint8.load_encoder` returns: an encoder, its parameters and its tokenizer, ready for texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jint8._core.config import Config
from jint8._inference.generate import bucket
from jint8._inference.programs import PROGRAMS
from jint8._trees.params import with_config
from jint8.checkpoints import Tokenizer
from jint8.models import Encoder, ModelConfig, context


@dataclasses.dataclass
class TextEncoder:
    """A loaded encoder.

    Attributes:
      model: the linen module.
      params: its parameters, projections as `QTensor`s.
      tokenizer: None where the checkpoint has none.
      config: the model's sizes and choices.
      quant: the `jint8.Config` it was loaded with.
      hf_config: the checkpoint's `config.json`, for `jint8.save`.
    """

    model: Encoder
    params: Any
    tokenizer: Tokenizer | None
    config: ModelConfig
    quant: Config
    hf_config: dict[str, Any] | None = None

    def embed(self, texts: str | Sequence[str], *, normalize: bool = True) -> np.ndarray:
        """One vector for each text: the mean of the last layer's features over its tokens.

        Longer texts than the model has positions for are cut before their last token, which says where a text ends.
        Several texts decide outliers per token, so that a vector doesn't depend on the other texts of the call.

        Args:
          texts: one text or several.
          normalize: to length 1, so that the product of two vectors is the cosine of their angle.

        Returns:
          float32 `[n, hidden_size]`; `[hidden_size]` for a single text.

        Raises:
          ValueError: the model has no tokenizer, there are no texts, or one without tokens.
        """
        if self.tokenizer is None:
            raise ValueError("Expected a checkpoint with a tokenizer, got one without.")
        single = isinstance(texts, str)
        ids = [self.tokenizer.encode(text) for text in ([texts] if isinstance(texts, str) else texts)]
        vectors = self.embed_tokens(ids, normalize=normalize)
        return vectors[0] if single else vectors

    def embed_tokens(self, ids: Sequence[Sequence[int]], *, normalize: bool = True) -> np.ndarray:
        """One vector for each sequence of tokens; see `embed`.

        Args:
          ids: token ids, with special tokens, at least one each.
          normalize: as in `embed`.

        Returns:
          float32 `[n, hidden_size]`.

        Raises:
          ValueError: no sequence or an empty one, or ids outside of the vocabulary.
        """
        if not ids or not all(len(row) for row in ids):
            raise ValueError("Expected texts of at least one token, got an empty one.")
        longest = self.config.max_positions
        ids = [[*row[: longest - 1], row[-1]] if len(row) > longest else list(row) for row in ids]
        length = min(bucket(max(map(len, ids))), longest)
        tokens = np.zeros((len(ids), length), np.int32)
        for row, source in zip(tokens, ids, strict=True):
            row[length - len(source) :] = source
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise ValueError(
                f"Expected token ids in [0, {self.config.vocab_size}), got {tokens.min()} to {tokens.max()}."
            )
        params = self.params
        if len(ids) > 1 and self.quant.decomposes and self.quant.depends_on_batch:
            params = with_config(params, self.quant.by_token())
        first = np.array([length - len(row) for row in ids], np.int32)
        vectors = np.asarray(PROGRAMS.run(_means, (self.model,), ({"params": params}, tokens, first)))
        if normalize:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
        return vectors


def _means(model: Encoder, params: Any, tokens: jax.Array, first: jax.Array) -> jax.Array:
    """The mean over the tokens of each row that aren't padding, float32 `[b, d]`. The encoder's padding is zeros."""
    hidden = model.apply(params, tokens, context(tokens, None, first))
    return jnp.sum(hidden.astype(jnp.float32), axis=1) / (tokens.shape[1] - first)[:, None]  # type: ignore[union-attr]
