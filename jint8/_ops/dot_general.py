"""`dot_general` and `einsum` with an int8 weight: which axes, then the product of `jint8.matmul`."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jint8._core.config import Config
from jint8._core.qtensor import is_qtensor, storage_axes
from jint8._ops import xla as _xla
from jint8._ops.matmul import check_activations, product_2d
from jint8._ops.observe import Observed, watch


def dot_general(
    lhs: Any,
    rhs: Any,
    dimension_numbers,
    precision=None,
    preferred_element_type=None,
    out_sharding=None,
    *,
    config: Config | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`jax.lax.dot_general` where one side may be a `QTensor`: that product is LLM.int8()'s.

    Args:
        lhs: array, or the `QTensor`.
        rhs: array, or the `QTensor`. Without any, this is `jax.lax.dot_general`.
        dimension_numbers: `((lhs_contract, rhs_contract), (lhs_batch, rhs_batch))`. The contracted axes of the weight
            must be those that it was quantized over. Outlier columns are decided within each entry of the batch axes.
        precision: only for products without a `QTensor`.
        preferred_element_type: dtype of the result; default: that of the activations.
        out_sharding: only for products without a `QTensor`.
        config: None means the one stored in the weight.
        implementation: as in `jint8.matmul`.

    Returns:
        Batch axes, then the free axes of `lhs`, then those of `rhs`.

    Raises:
        TypeError: activations of an unsupported dtype, or two `QTensor`s.
        ValueError: shapes that don't fit, or a weight quantized over other axes.

    Examples:
        >>> import jax.numpy as jnp, jint8
        >>> w = jint8.quantize(jnp.ones((4, 2, 3)), contract_axes=(0,))
        >>> jint8.dot_general(jnp.ones((5, 4)), w, (((1,), (0,)), ((), ()))).shape
        (5, 2, 3)
    """
    if is_qtensor(lhs) and is_qtensor(rhs):
        raise TypeError("Expected at most one QTensor, got two.")
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = (map(tuple, pair) for pair in dimension_numbers)
    if is_qtensor(rhs):
        x, w, x_contract, w_contract, x_batch, w_batch = lhs, rhs, lhs_contract, rhs_contract, lhs_batch, rhs_batch
    elif is_qtensor(lhs):
        x, w, x_contract, w_contract, x_batch, w_batch = rhs, lhs, rhs_contract, lhs_contract, rhs_batch, lhs_batch
    else:
        return lax.dot_general(
            lhs, rhs, dimension_numbers, precision, preferred_element_type, out_sharding=out_sharding
        )
    check_activations(x, "activations")
    config = w.config if config is None else config
    dtype = x.dtype if preferred_element_type is None else preferred_element_type
    y = contract(x, w, (x_contract, w_contract), (x_batch, w_batch), config, implementation, dtype)
    if w is lhs:  # batch, free of x, free of w -> batch, free of w, free of x
        batch, free_w = len(x_batch), len(w.shape) - len(w_batch) - len(w_contract)
        axes = range(y.ndim)
        y = jnp.transpose(y, (*axes[:batch], *axes[y.ndim - free_w :], *axes[batch : y.ndim - free_w]))
    return y


def contract(x, w, contracted, batched, config, implementation, dtype, bias=None):
    """`dtype`, batch axes, then free axes of x, then free axes of w. `bias` has the free axes of w: no batch axes."""
    (x_contract, w_contract), (x_batch, w_batch) = contracted, batched
    _check_axes(x, w, x_contract, w_contract, x_batch, w_batch)
    at = storage_axes(w)
    # contracted axes in the order in which the weight stores them: permuting x is cheap, permuting the weight isn't
    pairs = sorted((at[b % w.ndim], a % x.ndim) for a, b in zip(x_contract, w_contract, strict=True))
    stored_contract, x_contract = [p[0] for p in pairs], [p[1] for p in pairs]
    stored_batch, x_batch = [at[b % w.ndim] for b in w_batch], [a % x.ndim for a in x_batch]
    # free axes in the order of the float weight
    stored_free = [at[a] for a in range(w.ndim) if at[a] not in stored_contract and at[a] not in stored_batch]
    x_free = [a for a in range(x.ndim) if a not in x_contract and a not in x_batch]

    k_last = min(stored_contract) > max(stored_free, default=-1)
    order = stored_batch + (stored_free + stored_contract if k_last else stored_contract + stored_free)
    batch_shape = [x.shape[a] for a in x_batch]
    k = math.prod(x.shape[a] for a in x_contract)
    free_shape = [w.q.shape[a] for a in stored_free]
    n = math.prod(free_shape)

    x_rows = jnp.transpose(x, x_batch + x_free + x_contract)
    x_rows = x_rows.reshape(*batch_shape, math.prod(x.shape[a] for a in x_free), k)
    q = jnp.transpose(w.q, order).reshape(*batch_shape, *((n, k) if k_last else (k, n)))
    scale = jnp.transpose(w.scale, order).reshape(*batch_shape, n)
    zero = None if w.zero is None else jnp.transpose(w.zero, order).reshape(*batch_shape, n)
    if isinstance(w, Observed):
        tap = _columns(w.tap, order, stored_batch, stored_free, batch_shape)
        x_rows = watch(w.counted, x_rows, tap)
    rows, index = _outlier_columns(w, order, stored_batch, stored_free, batch_shape, (n, -1) if k_last else (-1, n))
    flat_bias = None if bias is None else bias.reshape(n)

    def product(x, weight):
        return product_2d(
            x, weight, flat_bias, k_last=k_last, config=config, implementation=implementation, dtype=dtype
        )

    for _ in batch_shape:
        product = jax.vmap(product)
    y = product(x_rows, _xla.Weight(q, scale, zero, rows, index))
    return y.reshape(*batch_shape, *(x.shape[a] for a in x_free), *free_shape)


def _outlier_columns(w, order, stored_batch, stored_free, batch_shape, shape):
    """`_xla.Weight.rows` and `index` of a weight that is transposed by `order`, for each entry of the batch."""
    if w.outlier_index is None:
        return None, None
    rows = jnp.transpose(w.outlier_rows, order).reshape(*batch_shape, *shape)
    return rows, _columns(w.outlier_index, order, stored_batch, stored_free, batch_shape)


def _columns(leaf, order, stored_batch, stored_free, batch_shape):
    """A leaf with a list for each stacked weight, as a list for each entry of the batch."""
    if any(leaf.shape[axis] != 1 for axis in stored_free):
        raise ValueError(
            "Expected one list of outlier columns for all output channels, got one for each entry of an axis that "
            f"isn't a batch axis: {leaf.shape}."
        )
    stacked = [leaf.shape[axis] for axis in stored_batch]
    columns = leaf.size // math.prod(stacked)
    return jnp.broadcast_to(jnp.transpose(leaf, order).reshape(*stacked, columns), (*batch_shape, columns))


def _check_axes(x, w, x_contract, w_contract, x_batch, w_batch):
    for name, ours, theirs in (("contracted", x_contract, w_contract), ("batch", x_batch, w_batch)):
        if len(ours) != len(theirs):
            raise ValueError(f"Expected as many {name} axes on both sides, got {tuple(ours)} and {tuple(theirs)}.")
        for a, b in zip(ours, theirs, strict=True):
            if not (-x.ndim <= a < x.ndim and -w.ndim <= b < w.ndim):
                raise ValueError(f"Expected {name} axes within {x.shape} and {w.shape}, got {a} and {b}.")
            if x.shape[a] != w.shape[b]:
                raise ValueError(
                    f"Expected {name} axes of one size, got {x.shape[a]} (axis {a} of {x.shape}) "
                    f"and {w.shape[b]} (axis {b} of the weight {w.shape})."
                )
    for ndim, axes in ((x.ndim, (*x_contract, *x_batch)), (w.ndim, (*w_contract, *w_batch))):
        if len({a % ndim for a in axes}) != len(axes):
            raise ValueError(f"Expected each axis to be contracted or batched once, got {axes}.")
    if not w_contract:
        raise ValueError("Expected at least one contracted axis, got none.")
    at = storage_axes(w)
    contract = {at[b % w.ndim] for b in w_contract}
    for axis in range(w.ndim):
        size, scales = w.q.shape[axis], w.scale.shape[axis]
        if (axis in contract and scales != 1) or (axis not in contract and scales != size):
            raise ValueError(
                f"Expected a weight that was quantized over the contracted axes {tuple(w_contract)}, "
                f"got one of shape {w.shape} with scales of shape {w.scale.shape}; see contract_axes in jint8.quantize."
            )


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
    inputs, output = _parse(subscripts, x, w, w_index)
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


def _parse(subscripts: str, x, w, w_index: int) -> tuple[tuple[list[str], list[str]], list[str]]:
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
