"""`jint8.einsum`: labels to axes, then the product of `jint8.dot_general`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jint8._core.config import Config
from jint8._core.qtensor import config_for, is_qtensor
from jint8._ops.checks import check_activations, check_result_type
from jint8._ops.dot_general import DimensionNumbers, activations_first
from jint8._ops.product import Implementation
from jint8._ops.stand_ins import no_stand_ins


def einsum(
    subscripts: str,
    *operands: Any,
    bias: jax.Array | None = None,
    config: Config | None = None,
    implementation: Implementation | None = None,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: Any = None,
) -> jax.Array:
    """`jax.numpy.einsum` where one of two operands may be a `QTensor`: that product is LLM.int8()'s.

    Args:
      subscripts: such as `"btd,dnh->btnh"`; the activations may have an ellipsis. Labels in both operands that aren't
        in the result are contracted, and must be those that the weight was quantized over.
      *operands: activations and a `QTensor`, in any order. Without a `QTensor`, this is `jax.numpy.einsum`.
      bias: None, or float of those axes of the result that the weight has, in the order of the result (`[n, h]` in the
        example above): added before the result is rounded.
      config: None means the one stored in the weight.
      implementation: as in `jint8.matmul`.
      precision: as in `jint8.dot_general`.
      preferred_element_type: dtype of the result; default: that of the activations.
      out_sharding: as in `jint8.dot_general`.

    Returns:
      The axes that the subscripts name.

    Raises:
      TypeError: as in `jint8.dot_general`.
      ValueError: subscripts that don't fit the operands, or a bias that doesn't fit the result.
      NotImplementedError: a `QTensor` with a repeated label, with an ellipsis or among more than two operands.

    Examples:
      >>> import jax.numpy as jnp, jint8
      >>> w = jint8.quantize(jnp.ones((4, 2, 3)), contract_axes=(0,))
      >>> jint8.einsum("...d,dnh->...nh", jnp.ones((5, 4)), w, bias=jnp.zeros((2, 3))).shape
      (5, 2, 3)
    """
    if not any(is_qtensor(operand) for operand in operands):
        no_stand_ins()
        if bias is not None or config is not None or implementation is not None:
            raise TypeError("Expected a QTensor beside bias, config or implementation, got none.")
        return jnp.einsum(
            subscripts,
            *operands,
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
        )
    if len(operands) != 2:
        raise NotImplementedError(f"Expected two operands where one is a QTensor, got {len(operands)}.")
    if all(is_qtensor(operand) for operand in operands):
        raise TypeError("Expected at most one QTensor, got two.")
    w_index = 1 if is_qtensor(operands[1]) else 0
    x, w = operands[1 - w_index], operands[w_index]
    if w_index == 0 and isinstance(precision, tuple):  # one for each side
        precision = precision[::-1]
    check_activations(x, "activations")
    check_result_type(preferred_element_type)
    labels = parse_subscripts(subscripts, x, w, w_index)
    y = activations_first(
        labels.sum_alone(x),
        w,
        labels.numbers,
        config=config_for(w, config),
        implementation=implementation,
        dtype=x.dtype if preferred_element_type is None else preferred_element_type,
        bias=None if bias is None else labels.arrange_bias(bias),
        precision=precision,
    )
    y = labels.arrange(y)
    return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)


@dataclasses.dataclass(frozen=True)
class Labels:
    """The subscripts of a product of activations and a weight; an ellipsis is spelled out as labels "0", "1", ...

    Attributes:
      x: of the activations, without those that are summed up alone.
      w: of the weight.
      output: of the result.
      alone: axes of the activations that are neither in the weight nor in the result.
    """

    x: list[str]
    w: list[str]
    output: list[str]
    alone: list[int]

    @property
    def batch(self) -> list[str]:
        """Labels of both operands and of the result."""
        return [label for label in self.x if label in self.w and label in self.output]

    @property
    def free_w(self) -> list[str]:
        """Labels of the weight alone."""
        return [label for label in self.w if label not in self.x]

    @property
    def numbers(self) -> DimensionNumbers:
        """What `activations_first` takes."""
        contracted = [label for label in self.x if label in self.w and label not in self.output]

        def axes(of: list[str], shared: list[str]) -> tuple[int, ...]:
            return tuple(of.index(label) for label in shared)

        return (
            (axes(self.x, contracted), axes(self.w, contracted)),
            (axes(self.x, self.batch), axes(self.w, self.batch)),
        )

    def sum_alone(self, x: jax.Array) -> jax.Array:
        """The activations, with the axes summed up that nothing else has."""
        return jnp.sum(x, axis=self.alone) if self.alone else x

    def arrange(self, y: jax.Array) -> jax.Array:
        """The result of `activations_first`, with its axes in the order of the subscripts."""
        free_x = [label for label in self.x if label not in self.w]
        got = [*self.batch, *free_x, *self.free_w]
        return jnp.transpose(y, [got.index(label) for label in self.output])

    def arrange_bias(self, bias: jax.Array) -> jax.Array:
        """A bias of the result's axes that the weight has, as `[*batch, *free axes of the weight]`."""
        given = [label for label in self.output if label in self.w]
        if bias.ndim != len(given):
            raise ValueError(f"Expected a bias of the axes {', '.join(given)}, got shape {bias.shape}.")
        return jnp.transpose(bias, [given.index(label) for label in (*self.batch, *self.free_w)])


def parse_subscripts(subscripts: str, x: Any, w: Any, w_index: int) -> Labels:
    """The labels of the subscripts, of which the weight's are those of operand `w_index`."""
    text = subscripts.replace(" ", "")
    if text.count(",") != 1 or text.count("->") > 1:
        raise ValueError(f"Expected subscripts for two operands, got {subscripts!r}.")
    left, arrow, right = text.partition("->")
    terms = left.split(",")
    x_term, w_term = terms[1 - w_index], terms[w_index]
    if not all(label.isascii() and label.isalpha() for label in "".join([*terms, right]).replace("...", "")):
        raise ValueError(f"Expected labels to be letters, got {subscripts!r}.")
    if "." in w_term:
        raise NotImplementedError(f"Expected no ellipsis for the QTensor, got {subscripts!r}.")
    extra = x.ndim - len(x_term.replace("...", "")) if "..." in x_term else 0
    ellipsis = [f"{i}" for i in range(max(extra, 0))]

    def expand(term: str) -> list[str]:
        head, dots, tail = term.partition("...")
        return [*head, *(ellipsis if dots else ()), *tail]

    x_labels, w_labels = expand(x_term), list(w_term)
    if not arrow:
        once = sorted(label for label in x_term.replace("...", "") + w_term if (x_term + w_term).count(label) == 1)
        output = ellipsis + once
    else:
        output = expand(right)
        if not set(ellipsis) <= set(output):
            raise ValueError(f"Expected the ellipsis in the result too, got {subscripts!r}.")
    for name, labels, shape in (("activations", x_labels, x.shape), ("weight", w_labels, w.shape)):
        if len(labels) != len(shape):
            raise ValueError(f"Expected {len(labels)} dimensions of the {name} in {subscripts!r}, got shape {shape}.")
        if len(set(labels)) != len(labels):
            raise NotImplementedError(f"Expected each label once in an operand beside a QTensor, got {subscripts!r}.")
    if len(set(output)) != len(output) or not set(output) <= {*x_labels, *w_labels}:
        raise ValueError(f"Expected a result made of the operands' labels, each once, got {subscripts!r}.")
    if lost := [label for label in w_labels if label not in x_labels and label not in output]:
        raise NotImplementedError(f"Expected no sum over the weight's own axes {lost}, got {subscripts!r}.")
    alone = [i for i, label in enumerate(x_labels) if label not in w_labels and label not in output]
    kept = [label for i, label in enumerate(x_labels) if i not in alone]
    return Labels(kept, w_labels, output, alone)
