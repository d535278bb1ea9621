"""What `jint8.load` returns: a model, its parameters and its tokenizer, ready for text.

Tokens are made by `generate` and `sampling`; here are the arguments of a request, and the way from text and back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jint8._core.calibration import Calibration
from jint8._core.config import Config
from jint8._inference.generation import generate, warm
from jint8._inference.logits import logits
from jint8._inference.request import Choice, Request, check_ids, check_length, check_prompts, check_seed, texts
from jint8._inference.sampling import Sampling, whole
from jint8._inference.sizes import is_long
from jint8._inference.text import stop_texts, text_pieces
from jint8._trees.params import with_config
from jint8.analysis._calibrate import calibrate
from jint8.analysis._criteria import Criteria
from jint8.checkpoints import Tokenizer
from jint8.models import Decoder, ModelConfig
from jint8.models._cache import check_cache

STREAM_TOKENS = 4  # tokens at a time while streaming
STOP_TOKENS = 16  # and where nothing is streamed, but a stop text may end the answer
CALIBRATION_LENGTH = 256  # tokens of a sequence


@dataclasses.dataclass
class LanguageModel:
    """A loaded decoder.

    Attributes:
      model: the linen module.
      params: its parameters, projections as `QTensor`s.
      tokenizer: None where the checkpoint has none.
      config: the model's sizes and choices.
      quant: the `jint8.Config` it was loaded with.
      hf_config: the checkpoint's `config.json`, for `jint8.save`.
    """

    model: Decoder
    params: Any
    tokenizer: Tokenizer | None
    config: ModelConfig
    quant: Config
    hf_config: dict[str, Any] | None = None

    def logits(self, tokens: npt.ArrayLike, *, cache: str | None = None) -> jax.Array:
        """Logits at every position.

        Args:
          tokens: int `[b, s]`, without padding.
          cache: None computes without one; `"int8"` reads keys and values from an int8 cache, as decoding does.

        Returns:
          float32 `[b, s, vocab]`.

        Raises:
          TypeError: tokens that aren't integers.
          ValueError: not two-dimensional, ids outside of the vocabulary, more tokens than a table of positions has, or
            an unknown cache.
        """
        check_cache(cache)
        tokens = np.asarray(tokens)
        if tokens.ndim != 2:
            raise ValueError(f"Expected tokens of shape (b, s), got {tokens.shape}.")
        check_ids(self.config, tokens)
        check_length(self.config, tokens.shape[1])
        return logits(self.model, {"params": self.params}, jnp.asarray(tokens, jnp.int32), cache)

    def calibrate(
        self,
        text: str | None = None,
        *,
        threshold: float | None = None,
        relative: bool | None = None,
        layer_share: float = Criteria.layer_share,
        position_share: float = Criteria.position_share,
        budget: float | None = None,
    ) -> Calibration:
        """Outlier feature dimensions on a text, and rms of all, for `outliers=` in `jint8.load`; see `jint8.calibrate`.

        Args:
          text: None is a short one that comes with the package, or random tokens where there is no tokenizer.
          threshold: magnitude from which on a value is an outlier. None is that of the model's config where both are
            relative, else the paper's 6.
          relative: the threshold counts in mean magnitudes of the token. None is as in the model's config.
          layer_share: share of layers in which a dimension has to have outliers.
          position_share: share of positions, in those layers.
          budget: None, or how many columns per layer (a share of them if below 1), whatever the rest says.

        Returns:
          From path to int32 indices; see `jint8.calibrate`.

        Raises:
          ValueError: a text without a tokenizer or of less than two tokens, or an option out of its range.
        """
        if relative is None:
            relative = self.quant.relative
        if threshold is None:
            threshold = self.quant.threshold if relative and self.quant.relative else Criteria.threshold
        return calibrate(
            self.run,
            {"params": self.params},
            self.batches(text),
            threshold=threshold,
            relative=relative,
            layer_share=layer_share,
            position_share=position_share,
            budget=budget,
            skip=() if self.config.tie_embeddings else "embedding",  # which then is only looked up
        )

    def run(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Logits of `tokens[b, s]` with other parameters: a function for `jint8.calibrate` and `jint8.analysis`."""
        return logits(self.model, params, tokens)

    def batches(self, text: str | None = None, length: int = CALIBRATION_LENGTH) -> list[np.ndarray]:
        """A text, or the short one that comes with the package, as calls of `run`: int32 `[1, length]` each.

        A shorter text is one call; what remains of a longer one is dropped. Without a text and a tokenizer, one call of
        random tokens, the same each time. Calls are no longer than the model has learned positions for.

        Raises:
          ValueError: a text for a model that has no tokenizer, a text of less than two tokens, or a length below 2.
        """
        if length < 2:
            raise ValueError(f"Expected sequences of at least 2 tokens, got {length}.")
        length = length if self.config.learned_positions is None else min(length, self.config.max_positions)
        if text is None and self.tokenizer is None:
            return [np.random.default_rng(0).integers(self.config.vocab_size, size=(1, length), dtype=np.int32)]
        if text is None:
            text = resources.files("jint8").joinpath("data/calibration.txt").read_text(encoding="utf-8")
        ids = np.asarray(self.require_tokenizer().encode(text), np.int32)
        if len(ids) < 2:
            raise ValueError(f"Expected a text of at least 2 tokens, got {len(ids)}.")
        length = min(length, len(ids))
        return list(ids[: len(ids) // length * length].reshape(-1, 1, length))

    # Overloads 1 and 2 overlap with 3 and 4, because a str is a sequence of str; the first that matches counts.
    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompts: str, *, stream: Literal[False] = ..., **request: Unpack[Request]
    ) -> str: ...
    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompts: str, *, stream: Literal[True], **request: Unpack[Request]
    ) -> Iterator[str]: ...
    @overload
    def generate(
        self, prompts: Sequence[str], *, stream: Literal[False] = ..., **request: Unpack[Request]
    ) -> list[str]: ...
    @overload
    def generate(
        self, prompts: Sequence[str], *, stream: Literal[True], **request: Unpack[Request]
    ) -> Iterator[list[str]]: ...
    @overload
    def generate(self, prompts: str | Sequence[str], *, stream: bool, **request: Unpack[Request]) -> Any: ...
    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        stream: bool = False,
        config: Config | None = None,
        cache: str | None = None,
    ) -> str | list[str] | Iterator[str] | Iterator[list[str]]:
        """Continues text.

        Args:
          prompts: one text or several; each is continued by itself.
          max_tokens: at most so many new tokens.
          temperature: 0 takes the most likely token; above it, tokens are drawn from `softmax(logits / temperature)`.
          top_k: draw among so many most likely tokens; 0 means all.
          top_p: draw among the most likely tokens that together hold this probability.
          min_p: draw among tokens at least this many times as likely as the most likely one.
          repetition_penalty: divides positive logits of tokens of the prompt and the answer so far, and multiplies
            negative ones; 1 means none.
          seed: of the draw.
          stop: a text before which an answer ends, or several.
          stream: yield pieces of text as they come.
          config: how to multiply. None is the one the model was loaded with, except that several prompts, and long
            ones, which run in chunks, decide outliers per token, so that an answer doesn't depend on what else is in
            the call.
          cache: of keys and values. None keeps them in the activations' dtype; `"int8"` in int8, with a scale for each
            token and head, in about a quarter of the memory of float32.

        Returns:
          The new text without the prompt: a str for a str, a list for a list. With `stream`, an iterator over pieces
          (for a list: over lists of one piece for each prompt).

        Raises:
          ValueError: the model has no tokenizer, an empty prompt, or a parameter out of its range.
        """
        tokenizer = self.require_tokenizer()
        single = isinstance(prompts, str)
        ids = [tokenizer.encode(text) for text in texts("prompts", prompts)]
        stop = stop_texts(stop)
        every = STREAM_TOKENS if stream else STOP_TOKENS if stop else max_tokens
        choice: Choice = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        choice["repetition_penalty"] = repetition_penalty
        options: Any = {"max_tokens": max_tokens, "seed": seed, "config": config, "cache": cache, "every": every}
        chunks = self.generate_tokens(ids, **options, **choice)
        pieces = text_pieces(chunks, tokenizer, len(ids), stop)
        if stream:
            return (piece[0] for piece in pieces) if single else pieces
        answers = ["".join(row) for row in zip(*pieces, strict=True)]
        return answers[0] if single else answers

    def generate_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int = 128,
        seed: int = 0,
        config: Config | None = None,
        cache: str | None = None,
        every: int = STREAM_TOKENS,
        **choice: Unpack[Choice],
    ) -> Iterator[np.ndarray]:
        """Continues token sequences; see `generate`.

        Args:
          prompts: token ids, with at least one each.
          every: how many tokens to yield at a time.
          max_tokens, seed, config, cache: as in `generate`.
          **choice: `temperature`, `top_k`, `top_p`, `min_p` and `repetition_penalty`, as in `generate`.

        Yields:
          int32 `[b, n]`, n at most `every`: the next tokens of each prompt. The first holds one token, from prefill. A
          row that has ended goes on with the end token.
        """
        max_tokens, every = whole("max_tokens", max_tokens, least=1), whole("every", every, least=1)
        seed, eos = check_seed(seed), self._end_tokens
        sampling = Sampling.of(**choice, end_tokens=eos)
        check_prompts(self.config, prompts, max_tokens)
        if config is not None:
            params = {"params": with_config(self.params, config)}
        else:
            params = self._params_for(several=len(prompts) > 1 or is_long(prompts))
        options: dict[str, Any] = {"max_tokens": max_tokens, "seed": seed, "every": every, "kind": check_cache(cache)}
        return generate(self.model, params, prompts, sampling=sampling, **options)

    def warm(self, *, batch: int = 1, prompt: int = 512, max_tokens: int = 128, cache: str | None = None) -> None:
        """Compiles ahead what requests need, so that none of them waits for it.

        Args:
          batch: the most prompts of a request.
          prompt: their most tokens.
          max_tokens: the most new tokens.
          cache: its kind, as in `generate`.

        On a CPU this covers all requests up to these sizes; on GPUs and over several devices those of just these.

        Raises:
          TypeError: a size that isn't a whole number.
          ValueError: a size below 1, more tokens than the model has positions for, or an unknown cache.
        """
        batch, prompt = whole("batch", batch, least=1), whole("prompt", prompt, least=1)
        max_tokens = whole("max_tokens", max_tokens, least=1)
        check_length(self.config, prompt + max_tokens)
        single, several = self._params_for(several=False), self._params_for(several=True)
        sizes: Any = {"batch": batch, "prompt": prompt, "max_tokens": max_tokens, "kind": check_cache(cache)}
        warm(self.model, single, several, end_tokens=self._end_tokens, **sizes)

    @property
    def _end_tokens(self) -> tuple[int, ...]:
        return self.tokenizer.eos_ids if self.tokenizer else ()

    def _params_for(self, *, several: bool) -> dict[str, Any]:
        """The parameters as `generate` takes them for one short prompt, or for several and long ones."""
        if several and self.quant.decomposes and self.quant.depends_on_batch:
            return {"params": with_config(self.params, self.quant.by_token())}
        return {"params": self.params}

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises ValueError where there is none."""
        if self.tokenizer is None:
            raise ValueError("Expected a checkpoint with a tokenizer, got one without.")
        return self.tokenizer
