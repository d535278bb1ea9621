"""One parameter, read from the tensors that it is made of, a few rows at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jint8._convert import bitsandbytes as bitsandbytes
from jint8._convert.assemble import Assembly, place
from jint8._convert.quantize_rows import cast, check_finite, quantized_rows
from jint8._convert.targets import Target
from jint8._core.config import Config
from jint8._core.outlier_rows import check_outliers
from jint8._core.qtensor import QTensor
from jint8._core.quantize import quantize
from jint8._core.rounding import SMALLEST_NORMAL
from jint8.checkpoints import Checkpoint

# From a tensor's name and a range of its rows to blocks of these rows, from top to bottom. Of each block, the values in
# the checkpoint, and the rows of the parameter's arrays, by field.
_ReadBlocks = Callable[[str, slice], Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]]


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

    def read(self, *, outliers: ArrayLike | None = None, sharding: Any = None) -> jax.Array | QTensor:
        """The parameter.

        Args:
          outliers: calibrated outlier columns, whose values a `QTensor` keeps in 16 bits as well.
          sharding: a `NamedSharding`; for a `QTensor` a `QTensor` of them. None is one device.

        Raises:
          ValueError: values that a weight can't have; the message names file and tensor.
          TypeError, ValueError: outliers that don't fit; the message names the parameter.
        """
        shape = self.target.float_leaf.shape
        if self.target.contract_axes is None:
            arrays = {"float": Assembly(shape, self.dtype, sharding)}
            self._fill(arrays, self._float_blocks)
            return arrays["float"].array()
        of_q, of_scale = (None, None) if sharding is None else (sharding.q, sharding.scale)
        arrays = {"q": Assembly(shape, np.int8, of_q), "scale": Assembly((*shape[:-1], 1), np.float32, of_scale)}
        if self.config.table_row.affine:
            arrays["zero"] = Assembly((*shape[:-1], 1), np.float32, of_scale)
        config, columns, more = self.config, None, dict[str, Any]()
        if outliers is not None:
            config, index = self._check_outliers(outliers, shape)
            if slots := index.shape[-1]:
                arrays["outlier_rows"] = Assembly((*shape[:-1], slots), np.float16, of_scale)
                columns = np.repeat(index.reshape(-1, slots), shape[-2], axis=0)  # of each row
                replicated = None if of_scale is None else NamedSharding(of_scale.mesh, PartitionSpec())
                more["outlier_index"] = place(index.reshape(*shape[:-2], 1, slots), replicated)
        self._fill(arrays, self._int8_blocks, columns)
        more |= {field: assembly.array() for field, assembly in arrays.items()}
        return QTensor(**more, dtype=self.dtype, config=config)

    def _check_outliers(self, outliers: ArrayLike, shape: tuple[int, ...]) -> tuple[Config, np.ndarray]:
        """The config of a weight with these outlier columns, and the columns as int32 `[*stack, c]`."""
        axes = tuple(range(len(shape)))
        try:
            config, index = check_outliers(outliers, shape, axes[-1:], axes[:-2], self.config)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.path}: {error}") from None
        return config, np.asarray(index)

    def _fill(self, arrays: dict[str, Assembly], blocks: _ReadBlocks, columns: np.ndarray | None = None) -> None:
        """Reads all tensors into `arrays`, with each tensor's rows where `Source.order` has them."""
        order, start = self.target.source.order, 0
        destinations = None if order is None else np.argsort(order)
        for name in self.target.source.tensors:
            info = self.checkpoint.tensors[name]
            rows = info.shape[-1 if self._transposed(name) else 0]
            at = np.arange(start, start + rows) if destinations is None else destinations[start : start + rows]
            try:
                self._fill_rows(arrays, blocks, columns, name, at)
            except ValueError as error:
                raise ValueError(f"{info.file}: tensor {name!r}: {error}") from None
            self.count(info.nbytes)
            start += rows

    def _fill_rows(
        self, arrays: dict[str, Assembly], blocks: _ReadBlocks, columns: np.ndarray | None, name: str, at: np.ndarray
    ) -> None:
        """Reads a tensor's rows, which become rows `at` of the parameter; only those that devices of ours hold."""
        held = np.flatnonzero(next(iter(arrays.values())).holds(at))
        if not len(held):
            return
        rows = slice(int(held[0]), int(held[-1]) + 1)
        if self.config.table_row.weights == "tensor":  # the one scale is that of all rows, so all have to be read
            rows = slice(0, len(at))
        start = rows.start
        for values, pieces in blocks(name, rows):
            those = at[start : start + len(values)]
            if columns is not None:
                pieces["outlier_rows"] = _outlier_rows(values, columns[those], pieces["scale"])
            for field, piece in pieces.items():
                arrays[field].put(those, piece)
            start += len(values)

    def _int8_blocks(self, name: str, rows: slice) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Rows of a tensor as those of a `QTensor`'s arrays."""
        scheme = self.config.table_row
        if bitsandbytes.is_int8_weight(self.checkpoint, name):
            q, scale = bitsandbytes.read_weight(self.checkpoint, name, rows)
            yield q, {"q": q, "scale": scale}
            return
        value = self._read(name, rows)
        if scheme.weights == "channel" and not scheme.affine:
            for some, q, scale in quantized_rows(value):
                yield value[some], {"q": q, "scale": scale}
            return
        check_finite(value)
        w = quantize(jnp.array(value), contract_axes=(value.ndim - 1,), config=self.config)
        fields = {"q": w.q, "scale": w.scale} | ({} if w.zero is None else {"zero": w.zero})
        yield value, {field: np.asarray(array) for field, array in fields.items()}

    def _float_blocks(self, name: str, rows: slice) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Rows of a tensor in floating point."""
        # int8 nevertheless, where bitsandbytes skipped another tensor of the same fused projection
        if bitsandbytes.is_int8_weight(self.checkpoint, name):
            q, scale = bitsandbytes.read_weight(self.checkpoint, name, rows)
            value = q * scale
        else:
            value = self._read(name, rows)
            check_finite(value)
        yield value, {"float": cast(value, self.dtype)}

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
        """Whether a tensor is stored as `[k, n]`; int8 of bitsandbytes never is."""
        return self.target.source.transposed and not bitsandbytes.is_int8_weight(self.checkpoint, name)


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
