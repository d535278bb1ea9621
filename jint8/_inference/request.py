"""What is asked for, and checks of it before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np

from jint8._core.config import Config
from jint8._inference.sampling import whole
from jint8.models import ModelConfig


class Choice(TypedDict, total=False):
    """How the next token is chosen: the keywords of `Sampling.of` that are `LanguageModel.generate`'s as well."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float


class Request(Choice, total=False):
    """What can be asked of `LanguageModel.generate`, besides prompts and `stream`: its keywords, for type checkers."""

    max_tokens: int
    seed: int
    stop: str | Sequence[str]
    config: Config | None
    cache: str | None


def texts(name: str, value: Any) -> list[str]:
    """One text, or several, as a list.

    Raises:
      TypeError: it is neither.
      ValueError: a text that isn't valid Unicode.
    """
    if isinstance(value, str):
        found = [value]
    elif isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        found = list(value)
    else:
        raise TypeError(f"Expected {name} to be a text or a list of texts, got {value!r}.")
    for i, text in enumerate(found):
        if not isinstance(text, str):
            raise TypeError(f"Expected {name} to be a text or a list of texts, got {text!r} in it.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            where = name if isinstance(value, str) else f"{name}[{i}]"
            raise ValueError(
                f"Expected {where} to be valid Unicode, got half of a surrogate pair at position {error.start}."
            ) from None
    return found


def check_ids(config: ModelConfig, ids: np.ndarray) -> None:
    """A lookup in the embedding clamps ids that it has no row for, which would give a wrong answer silently.

    Raises:
      TypeError: ids that aren't integers.
      ValueError: ids outside of the vocabulary.
    """
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"Expected integer tokens, got {ids.dtype}.")
    if ids.size and not (ids.min() >= 0 and ids.max() < config.vocab_size):
        raise ValueError(f"Expected token ids in [0, {config.vocab_size}), got {int(ids.min())} to {int(ids.max())}.")


def check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    """At least one, of tokens that the model has, with room for `max_tokens` more.

    Raises:
      TypeError: ids that aren't integers.
      ValueError: no prompt, an empty one, ids outside of the vocabulary, or too many.
    """
    if len(prompts) == 0 or not all(len(ids) for ids in prompts):
        got = "an empty one" if len(prompts) else "no prompt"
        raise ValueError(f"Expected prompts of at least one token, got {got}.")
    for ids in prompts:
        check_ids(config, np.asarray(ids))
        check_length(config, len(ids) + max_tokens)


def check_seed(seed: Any) -> int:
    """A whole number that 64 bits hold.

    Raises:
      TypeError: it isn't a whole number.
      ValueError: it has more bits.
    """
    seed = whole("seed", seed, least=-(2**63))
    if seed >= 2**64:
        raise ValueError(f"Expected seed to be below 2**64, got {seed}.")
    return seed


def check_length(config: ModelConfig, length: int) -> None:
    """Learned positions are a table, which ends. Rotary positions and ALiBi go on, with falling quality.

    Raises:
      ValueError: more tokens than the table has.
    """
    longest = config.max_positions
    if config.learned_positions is not None and length > longest:
        raise ValueError(f"Expected at most {longest} tokens, which this model has positions for, got {length}.")
