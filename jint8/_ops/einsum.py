"""`jint8.einsum`: labels to axes, then `jint8.dot_general`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jint8._core.config import Config
from jint8._core.qtensor import is_qtensor
from jint8._ops.checks import check_activations
from jint8._ops.dot_general import dot_general


def einsum(
    subscripts: str,
    *operands: Any,
    config: Config | None = None,
    implementation: str | None = None,
    precision=None,
    preferred_element_type=None,
) -> jax.Array:
    """`jax.numpy.einsum` where one of two operands may be a `QTensor`: that product is LLM.int8()'s.

    Args:
        subscripts: such as `"btd,dnh->btnh"`; the activations may have an ellipsis. Labels in both operands that
            aren't in the result are contracted, and must be those that the weight was quantized over.
        *operands: activations and a `QTensor`, in any order. Without a `QTensor`, this is `jax.numpy.einsum`.
        config: None means the one stored in the weight.
        implementation: as in `jint8.matmul`.
        precision: only for products without a `QTensor`.
        preferred_element_type: dtype of the result; default: that of the activations.

    Returns:
        The axes that the subscripts name.

    Raises:
        TypeError: as in `jint8.dot_general`.
        ValueError: subscripts that don't fit the operands.
        NotImplementedError: a `QTensor` with a repeated label, with an ellipsis or among more than two operands.

    Examples:
        >>> import jax.numpy as jnp, jint8
        >>> w = jint8.quantize(jnp.ones((4, 2, 3)), contract_axes=(0,))
        >>> jint8.einsum("...d,dnh->...nh", jnp.ones((5, 4)), w).shape
        (5, 2, 3)
    """
    if not any(is_qtensor(operand) for operand in operands):
        return jnp.einsum(subscripts, *operands, precision=precision, preferred_element_type=preferred_element_type)
    if len(operands) != 2:
        raise NotImplementedError(f"Expected two operands where one is a QTensor, got {len(operands)}.")
    if all(is_qtensor(operand) for operand in operands):
        raise TypeError("Expected at most one QTensor, got two.")
    w_index = 1 if is_qtensor(operands[1]) else 0
    x, w = operands[1 - w_index], operands[w_index]
    check_activations(x, "activations")
    inputs, output = parse_subscripts(subscripts, x, w, w_index)
    x_labels, w_labels = inputs

    sums = [i for i, label in enumerate(x_labels) if label not in w_labels and label not in output]
    if sums:
        x = jnp.sum(x, axis=sums)
        x_labels = [label for label in x_labels if label in w_labels or label in output]
    contract = [label for label in x_labels if label in w_labels and label not in output]
    batch = [label for label in x_labels if label in w_labels and label in output]
    numbers = (
        ([x_labels.index(c) for c in contract], [w_labels.index(c) for c in contract]),
        ([x_labels.index(b) for b in batch], [w_labels.index(b) for b in batch]),
    )
    y = dot_general(
        x, w, numbers, preferred_element_type=preferred_element_type, config=config, implementation=implementation
    )
    got = batch + [a for a in x_labels if a not in w_labels] + [a for a in w_labels if a not in x_labels]
    return jnp.transpose(y, [got.index(label) for label in output])


def parse_subscripts(subscripts: str, x, w, w_index: int) -> tuple[tuple[list[str], list[str]], list[str]]:
    """Labels of x, of w and of the result, an ellipsis spelled out as labels "0", "1", ..."""
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
    return (x_labels, w_labels), output
