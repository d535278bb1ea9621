"""Float arrays in the place of int8 weights, while `jint8.apply` traces a function to see what it does with them."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

_traced: contextvars.ContextVar[bool] = contextvars.ContextVar("traced", default=False)


class TakesWeights(BaseException):  # not an Exception, which the function might catch
    """The function hands its weights to code that has to be given the `QTensor`s themselves."""


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """A context in which weights are float arrays that stand for them."""
    token = _traced.set(True)
    try:
        yield
    finally:
        _traced.reset(token)


def no_stand_ins() -> None:
    """What a function begins with that takes float arrays as well as weights.

    Raises:
      TakesWeights: arrays may be stand-ins here.
    """
    if _traced.get():
        raise TakesWeights
