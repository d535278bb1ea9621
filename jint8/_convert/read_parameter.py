"""One parameter, read from the tensors that it is made of, a few rows at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jint8._convert import four_bit_codes as four_bit_codes
from jint8._convert import int8_weights as int8_weights
from jint8._convert.assemble import Assembly, place
from jint8._convert.quantize_rows import cast, check_finite, quantized_rows
from jint8._convert.rotate_rows import MeanSquares, Rotation
from jint8._convert.targets import Target, is_transposed
from jint8._core.config import Config
from jint8._core.four_bits import group_count, packed_size
from jint8._core.outlier_rows import check_outliers
from jint8._core.qtensor import QTensor
from jint8._core.quantize import quantize
from jint8._core.rotation import check_rms, rotation_block
from jint8._core.rounding import SMALLEST_NORMAL, affine, symmetric
from jint8.checkpoints import Checkpoint

# From a tensor's name, a range of its rows, and which rows of the parameter those become, to blocks of these rows, from
# top to bottom. Of each block, the values in the checkpoint, and the rows of the parameter's arrays, by field.
_ReadBlocks = Callable[[str, slice, np.ndarray], Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]]


@dataclasses.dataclass
class ParameterReader:
    """Reads one parameter.

    Attributes:
      checkpoint: that has its tensors.
      path: of the parameter, for messages.
      target: what it is made of and becomes.
      config: how to quantize.
      dtype: of the parameter in floating point, and of what a `QTensor` stands for.
      count: called with the bytes of each tensor that is done with.
    """

    checkpoint: Checkpoint
    path: str
    target: Target
    config: Config
    dtype: DTypeLike
    count: Callable[[int], None]

    def read(
        self,
        *,
        outliers: ArrayLike | None = None,
        rms: ArrayLike | None = None,
        moments: ArrayLike | None = None,
        sharding: Any = None,
    ) -> jax.Array | QTensor:
        """The parameter.

        Args:
          outliers: calibrated outlier columns, whose values a `QTensor` keeps in 16 bits as well.
          rms: of the activations' features, where the config rotates.
          moments: of the activations, in four bits.
          sharding: a `NamedSharding`; for a `QTensor` a `QTensor` of them. None is one device.

        Raises:
          ValueError: values that a weight can't have; the message names file and tensor.
          TypeError, ValueError: outliers or rms that don't fit; the message names the parameter.
        """
        shape = self.target.float_leaf.shape
        if self.target.contract_axes is None:
            arrays = {"float": Assembly(shape, self.dtype, sharding)}
            self._fill(arrays, self._float_blocks)
            return arrays["float"].array()
        group = self.target.group
        if self.config.four_bits and group is None:
            return self._four_bits(outliers=outliers, rms=rms, moments=moments)
        of_q, of_scale = (None, None) if sharding is None else (sharding.q, sharding.scale)
        arrays = {"scale": Assembly((*shape[:-1], 1), np.float32, of_scale)}
        if group is None:
            arrays["q"] = Assembly(shape, np.int8, of_q)
        else:
            arrays["q"] = Assembly((*shape[:-1], packed_size(shape[-1])), np.uint8)
            for field in ("group_scale", "group_min"):
                arrays[field] = Assembly((*shape[:-1], group_count(shape[-1], group)), np.float16)
        if self.config.table_row.affine:
            arrays["zero"] = Assembly((*shape[:-1], 1), np.float32, of_scale)
        config, columns, more = self.target.config(self.config), None, dict[str, Any]()
        if outliers is not None:
            config, index = self._checked(check_outliers, outliers, config=config)
            if slots := index.shape[-1]:
                arrays["outlier_rows"] = Assembly((*shape[:-1], slots), np.float16, of_scale)
                columns = np.asarray(index).reshape(-1, slots)  # of each of the stacked weights
                replicated = None if of_scale is None else NamedSharding(of_scale.mesh, PartitionSpec())
                more["outlier_index"] = place(columns.reshape(*shape[:-2], 1, slots), replicated)
        rotation = None
        if config.rotate:
            features = jax.ShapeDtypeStruct(shape, np.int8, sharding=of_q)
            config = dataclasses.replace(config, rotate=rotation_block(features, (len(shape) - 1,), config.rotate))
            of_x = None if rms is None else np.asarray(self._checked(check_rms, rms)).reshape(-1, shape[-1])
            rotation = Rotation(self._smooth(of_x, columns), columns, config.rotate)
            smooth = rotation.smooth.reshape(*shape[:-2], 1, shape[-1])
            more["smooth"] = place(smooth, None if sharding is None else sharding.smooth)
        blocks = functools.partial(self._int8_blocks, rotation) if group is None else self._code_blocks
        self._fill(arrays, blocks, columns)
        more |= {field: assembly.array() for field, assembly in arrays.items()}
        return QTensor(**more, dtype=self.dtype, config=config, features=None if group is None else shape[-1])

    def _four_bits(self, **known: ArrayLike | None) -> QTensor:
        """The parameter in four bits: all of it is in floating point first, as groups may run over its rows."""
        whole = {"float": Assembly(self.target.float_leaf.shape, np.float32)}
        self._fill(whole, functools.partial(self._float_blocks, dtype=np.float32))
        w = self._checked(_quantized, whole["float"].array(), config=self.config, **known)
        return dataclasses.replace(w, dtype=jnp.dtype(self.dtype))

    def _checked(self, check: Callable[..., Any], value: ArrayLike, **options: Any) -> Any:
        """`check(value, shape, contract_axes, stack_axes)`, with the parameter's name in its errors."""
        shape = self.target.float_leaf.shape
        axes = tuple(range(len(shape)))
        try:
            return check(value, shape, axes[-1:], axes[:-2], **options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.path}: {error}") from None

    def _smooth(self, rms: np.ndarray | None, columns: np.ndarray | None) -> np.ndarray:
        """The smoothing factors, `[stacked, k]`. They are those of all rows, which every process has to read."""
        shape = self.target.float_leaf.shape
        squares = MeanSquares(math.prod(shape[:-2]), shape[-2], shape[-1], columns, rms)
        for name, at in self._rows_of_tensors():
            with self._naming(name):
                squares.add(at, self._read(name, slice(0, len(at))))
        return squares.smooth()

    def _rows_of_tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """The names of the tensors, and which rows of the parameter the rows of each are."""
        order, start = self.target.source.order, 0
        destinations = None if order is None else np.argsort(order)
        for name in self.target.source.tensors:
            rows = self.checkpoint.tensors[name].shape[-1 if self._transposed(name) else 0]
            yield name, np.arange(start, start + rows) if destinations is None else destinations[start : start + rows]
            start += rows

    @contextlib.contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Names a tensor and its file in a ValueError."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.checkpoint.tensors[name].file}: tensor {name!r}: {error}") from None

    def _fill(self, arrays: dict[str, Assembly], blocks: _ReadBlocks, columns: np.ndarray | None = None) -> None:
        """Reads all tensors into `arrays`, with each tensor's rows where `Source.order` has them."""
        for name, at in self._rows_of_tensors():
            with self._naming(name):
                self._fill_rows(arrays, blocks, columns, name, at)
            self.count(self.checkpoint.tensors[name].nbytes)

    def _fill_rows(
        self, arrays: dict[str, Assembly], blocks: _ReadBlocks, columns: np.ndarray | None, name: str, at: np.ndarray
    ) -> None:
        """Reads a tensor's rows, which become rows `at` of the parameter; only those that devices of ours hold.

        `columns` are the calibrated ones of each of the stacked weights.
        """
        held = np.flatnonzero(next(iter(arrays.values())).holds(at))
        if not len(held):
            return
        rows = slice(int(held[0]), int(held[-1]) + 1)
        if self.config.table_row.weights == "tensor":  # the one scale is that of all rows, so all have to be read
            rows = slice(0, len(at))
        start = rows.start
        for values, pieces in blocks(name, rows, at[rows]):
            those = at[start : start + len(values)]
            if columns is not None:
                of_rows = columns[those // self.target.float_leaf.shape[-2]]
                pieces["outlier_rows"] = _outlier_rows(values, of_rows, pieces["scale"])
            for field, piece in pieces.items():
                arrays[field].put(those, piece)
            start += len(values)

    def _int8_blocks(
        self, rotation: Rotation | None, name: str, rows: slice, at: np.ndarray
    ) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Rows of a tensor as those of a `QTensor`'s arrays."""
        scheme = self.config.table_row
        if int8_weights.is_int8_weight(self.checkpoint, name):
            q, scale = int8_weights.read_weight(self.checkpoint, name, rows)
            yield q, {"q": q, "scale": scale}
            return
        original = value = self._read(name, rows)
        least = None
        if rotation is not None:
            value, least = rotation.rotated(original, at // self.target.float_leaf.shape[-2])
        if scheme.weights == "channel" and not scheme.affine:
            for some, q, scale in quantized_rows(value, least):
                yield original[some], {"q": q, "scale": scale}
            return
        check_finite(original)
        check_finite(value)  # which a rotation may make too large for float32
        by_row = scheme.weights == "channel"
        least = least if by_row or least is None else least.max(keepdims=True, initial=0)
        rounded, *scales = _rounding(scheme.affine)(jnp.array(value), 1 if by_row else (0, 1), least)
        columns = (np.broadcast_to(np.asarray(leaf), (len(value), 1)) for leaf in scales)
        yield original, {"q": np.asarray(rounded), **dict(zip(("scale", "zero"), columns, strict=False))}

    def _code_blocks(
        self, name: str, rows: slice, at: np.ndarray
    ) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Rows of a tensor as those of a `QTensor`'s arrays, with the checkpoint's own codes."""
        del at
        assert self.target.group is not None
        value = self._read(name, rows)
        yield value, four_bit_codes.read_rows(self.checkpoint, name, rows, self.target.group, value)

    def _float_blocks(
        self, name: str, rows: slice, at: np.ndarray, dtype: DTypeLike | None = None
    ) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Rows of a tensor in floating point, in `dtype` or that of the parameter."""
        del at
        # int8 nevertheless, where another tensor of the same fused projection was skipped
        if int8_weights.is_int8_weight(self.checkpoint, name):
            q, scale = int8_weights.read_weight(self.checkpoint, name, rows)
            value = q * scale
        else:
            value = self._read(name, rows)
            check_finite(value)
        yield value, {"float": cast(value, self.dtype if dtype is None else dtype)}

    def _read(self, name: str, rows: slice) -> np.ndarray:
        """Rows of a tensor in floating point, as the checkpoint has them but for the order of axes."""
        if self._transposed(name):
            value = self.checkpoint.read(name).T[rows]
        else:
            value = self.checkpoint.read_rows(name, rows.start, rows.stop)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"Expected floating point values, got {value.dtype}.")
        return value

    def _transposed(self, name: str) -> bool:
        """Whether a tensor is stored as `[k, n]`."""
        return is_transposed(self.checkpoint, self.target.source, name)


@functools.cache
def _rounding(is_affine: bool) -> Callable[..., tuple[jax.Array, ...]]:
    return jax.jit(functools.partial(affine if is_affine else symmetric, exact=True), static_argnums=1)


def _quantized(w: jax.Array, shape: Any, contract_axes: Any, stack_axes: Any, **options: Any) -> QTensor:
    """`quantize`, with the arguments of a check."""
    del shape
    return quantize(w, contract_axes=contract_axes, stack_axes=stack_axes, **options)


def _outlier_rows(values: np.ndarray, columns: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Some rows of `QTensor.outlier_rows`, float16 `[n, c]`: their values in units of `scale`.

    Args:
      values: of the rows as they are in the checkpoint, `[n, k]`. In int8 they are in units of the scale already.
      columns: the outlier columns of each row, `[n, c]`; k marks a slot that isn't used, where the result is 0.
      scale: `[n, 1]`. Where it is 0 or subnormal, so are the values, and the result is 0.
    """
    k = values.shape[1]
    found = np.take_along_axis(values, np.minimum(columns, k - 1), axis=1).astype(np.float32)
    if values.dtype != np.int8:
        usable = scale >= SMALLEST_NORMAL
        found = np.where(usable, found / np.where(usable, scale, 1), 0)
    return np.where(columns < k, found, 0).astype(np.float16)
