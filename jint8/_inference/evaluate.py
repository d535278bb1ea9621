"""Perplexity of a language model, and how far it is from another one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jint8._inference.language_model import LanguageModel
from jint8._inference.programs import PROGRAMS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
      perplexity: `exp` of the mean negative log-likelihood of the predicted tokens.
      tokens: how many were predicted.
      reference_perplexity: that of the reference; None without one.
      kl: mean over the predicted tokens of `KL(reference || model)` in nats; None without a reference.
      top1: share of predicted tokens for which both find the same token most likely; None without a reference.
    """

    perplexity: float
    tokens: int
    reference_perplexity: float | None = None
    kl: float | None = None
    top1: float | None = None


def evaluate(
    model: LanguageModel,
    tokens: npt.ArrayLike,
    *,
    batch_size: int = 1,
    reference: LanguageModel | None = None,
    cache: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Perplexity of a model, and how far its predictions are from those of another one.

    Each token of a sequence but the first is scored given those before it. With `q` the model's probabilities, `p` the
    reference's and means over all scored tokens:

        perplexity = exp(mean(-log q(token)))
        kl         = mean(sum over the vocabulary of p * (log p - log q))
        top1       = mean(argmax p == argmax q)

    Args:
      model: what `jint8.load` returned.
      tokens: int `[n, s]`, one sequence in each row, without padding.
      batch_size: rows per call. With `outliers="batch"`, outlier columns are decided per call, so that the result
        depends on it a little.
      reference: another model of the same vocabulary, such as the one in floating point. None compares with nothing.
      cache: of the model's keys and values, as in `LanguageModel.logits`: with `"int8"` every token reads those of all
        tokens up to itself from an int8 cache. The reference goes without one.
      progress: called with (rows done, rows in all).

    Returns:
      An `Evaluation`: `perplexity`, `tokens` (how many were scored), and with a reference `reference_perplexity`, `kl`
      and `top1`. Log-probabilities are float32, sums over tokens float64.

    Raises:
      TypeError: tokens that aren't integers.
      ValueError: tokens that aren't `[n, s]` with at least one row of two, ids outside of the vocabulary, a batch
        size below 1, an unknown cache, or a reference of another vocabulary.

    Examples:
      >>> import dataclasses, jax, jax.numpy as jnp, jint8
      >>> from jint8.models import Decoder, model_config
      >>> sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
      >>> counts = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
      >>> config = model_config({"model_type": "llama", **sizes, **counts})
      >>> module, tokens = Decoder(config), jax.random.randint(jax.random.key(0), (3, 8), 0, 64)
      >>> params = module.init(jax.random.key(1), tokens)["params"]
      >>> model = jint8.LanguageModel(module, params, None, config, jint8.Config(scheme="none"))  # or jint8.load
      >>> int8 = dataclasses.replace(model, params=jint8.quantize_params(params), quant=jint8.Config())
      >>> found = jint8.evaluate(int8, tokens, reference=model)
      >>> found.tokens, found.kl < 0.01, abs(found.perplexity / found.reference_perplexity - 1) < 0.01
      (21, True, True)
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise ValueError(f"Expected tokens of shape (n, s), n at least 1 and s at least 2, got {tokens.shape}.")
    if batch_size < 1:
        raise ValueError(f"Expected batch_size to be at least 1, got {batch_size}.")
    if reference is not None and reference.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"Expected a reference with the model's {model.config.vocab_size} tokens, got one with "
            f"{reference.config.vocab_size}."
        )
    totals = np.zeros(4)  # in float64: both negative log-likelihoods, KL, equal argmax
    for begin in range(0, len(tokens), batch_size):
        rows = tokens[begin : begin + batch_size]
        logits = model.logits(rows, cache=cache)
        if reference is None:
            scores = PROGRAMS.run(_scores, (), (logits, rows))
        else:
            scores = PROGRAMS.run(_compare, (), (reference.logits(rows), logits, rows))
        totals += [np.sum(np.asarray(score), dtype=np.float64) for score in scores]
        if progress is not None:
            progress(begin + len(rows), len(tokens))
    count = tokens.shape[0] * (tokens.shape[1] - 1)
    loss, reference_loss, kl, equal = (float(total) for total in totals / count)
    if reference is None:
        return Evaluation(perplexity=_exp(loss), tokens=count)
    return Evaluation(perplexity=_exp(loss), tokens=count, reference_perplexity=_exp(reference_loss), kl=kl, top1=equal)


def chunks(ids: Sequence[int], length: int) -> np.ndarray:
    """Consecutive sequences without overlap, `[n, length]`; what remains is dropped.

    Raises:
      ValueError: there isn't one whole sequence.

    Examples:
      >>> chunks([1, 2, 3, 4, 5], 2).tolist()
      [[1, 2], [3, 4]]
    """
    if length < 2:
        raise ValueError(f"Expected sequences of at least 2 tokens, got {length}.")
    n = len(ids) // length
    if n == 0:
        raise ValueError(f"Expected a text of at least {length} tokens, got {len(ids)}.")
    return np.asarray(ids[: n * length], np.int32).reshape(n, length)


def _scores(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, ...]:
    """As `_compare`, without a reference: only the first of the four sums isn't 0."""
    zero = jnp.zeros(())
    return _loss(_log_softmax(logits), tokens), zero, zero, zero


def _compare(reference: jax.Array, logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, ...]:
    """For each scored token: the model's `-log q`, the reference's `-log p`, KL, and whether both argmax are equal."""
    p, q = _log_softmax(reference), _log_softmax(logits)
    kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    equal = jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)
    return _loss(q, tokens), _loss(p, tokens), kl, equal


def _log_softmax(logits: jax.Array) -> jax.Array:
    """log q of the positions that predict a token: all but the last."""
    return jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32), axis=-1)


def _loss(log_probs: jax.Array, tokens: jax.Array) -> jax.Array:
    """The negative log-probability of each token that came next."""
    return -jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # math.exp raises where the result is infinite
