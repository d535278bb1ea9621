"""One parameter out of the tensors that it is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jint8._convert import bitsandbytes as bitsandbytes
from jint8._convert.assemble import Assembly, place
from jint8._convert.quantize_rows import cast, check_finite, quantized_rows
from jint8._core.config import Config
from jint8._core.outlier_rows import check_outliers
from jint8._core.qtensor import QTensor
from jint8._core.quantize import quantize as quantize_weight
from jint8._core.rounding import SMALLEST_NORMAL
from jint8.checkpoints import Checkpoint
from jint8.models import Decoder, Encoder
from jint8.models.families import Source


@dataclasses.dataclass
class Reader:
    """Reads a parameter out of the tensors that it is made of."""

    checkpoint: Checkpoint
    source: Source
    config: Config
    model: Decoder | Encoder
    tell: Callable[[int], None]  # bytes that are done with

    def read(
        self, path: str, shape: tuple[int, ...], *, quantized: bool, outliers: Any = None, sharding: Any = None
    ) -> jax.Array | QTensor:
        """The parameter. Raises ValueError, naming file and tensor, for values that it can't have.

        Args:
          path: of the parameter, for messages.
          shape: of it.
          quantized: whether it is to be a `QTensor`.
          outliers: calibrated outlier columns, whose values it keeps in 16 bits as well.
          sharding: of it, in a `QTensor` where it is one; None is one device.
        """
        if not quantized:
            return self._assembled({"": Assembly(shape, self.model.dtype, sharding)})[""]
        of_rows = None if sharding is None else sharding.scale
        arrays = {
            "q": Assembly(shape, np.int8, None if sharding is None else sharding.q),
            "scale": Assembly((*shape[:-1], 1), np.float32, of_rows),
        }
        if self.config.table_row.affine:
            arrays["zero"] = Assembly((*shape[:-1], 1), np.float32, of_rows)
        config, columns, more = self.config, None, dict[str, Any]()
        if outliers is not None:
            axes = tuple(range(len(shape)))
            try:
                config, index = check_outliers(outliers, shape, axes[-1:], axes[:-2], self.config)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{path}: {error}") from None
            index = np.asarray(index)
            if count := index.shape[-1]:
                arrays["outlier_rows"] = Assembly((*shape[:-1], count), np.float16, of_rows)
                columns = np.repeat(index.reshape(-1, count), shape[-2], axis=0)  # of each row
                whole = None if of_rows is None else NamedSharding(of_rows.mesh, PartitionSpec())
                more["outlier_index"] = place(index.reshape(*shape[:-2], 1, count), whole)
        return QTensor(**self._assembled(arrays, columns), **more, dtype=self.model.dtype, config=config)

    def _assembled(self, arrays: dict[str, Assembly], columns: np.ndarray | None = None) -> dict[str, Any]:
        order, start = self.source.order, 0
        places = None if order is None else np.argsort(order)
        for name in self.source.tensors:
            rows = self.checkpoint.tensors[name].shape[-1 if self._transposed(name) else 0]
            at = np.arange(start, start + rows) if places is None else places[start : start + rows]
            self._named(name, self._fill, arrays, columns, at)
            start += rows
        return {field: assembly.array() for field, assembly in arrays.items()}

    def _fill(self, name: str, arrays: dict[str, Assembly], columns: np.ndarray | None, at: np.ndarray) -> None:
        """Puts a tensor's rows, which are those of the numbers `at`: of these, the ones that devices of ours hold."""
        held = np.flatnonzero(next(iter(arrays.values())).holds(at))
        if not len(held):
            return
        rows = slice(int(held[0]), int(held[-1]) + 1)
        if self.config.table_row.weights == "tensor":  # its scale is that of all rows
            rows = slice(0, len(at))
        start = rows.start
        for values, pieces in self._quantized(name, rows) if "q" in arrays else self._float(name, rows):
            those = at[start : start + len(values)]
            if columns is not None:
                pieces["outlier_rows"] = _outlier_rows(values, columns[those], pieces["scale"])
            for field, piece in pieces.items():
                arrays[field].put(those, piece)
            start += len(values)

    def _quantized(self, name: str, rows: slice) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Rows of a tensor, as they are in the checkpoint and as arrays of a `QTensor`, from top to bottom."""
        scheme = self.config.table_row
        if bitsandbytes.is_int8_weight(self.checkpoint, name):
            q, scale = bitsandbytes.read_weight(self.checkpoint, name, rows)
            yield q, {"q": q, "scale": scale}
            return
        value = self._read(name, rows)
        if scheme.weights == "channel" and not scheme.affine:
            for some, steps, scale in quantized_rows(value):
                yield value[some], {"q": steps, "scale": scale}
            return
        check_finite(value)
        w = quantize_weight(jnp.array(value), contract_axes=(value.ndim - 1,), config=self.config)
        fields = {"q": w.q, "scale": w.scale} | ({} if w.zero is None else {"zero": w.zero})
        yield value, {field: np.asarray(array) for field, array in fields.items()}

    def _float(self, name: str, rows: slice) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Rows of a tensor, in floating point."""
        if bitsandbytes.is_int8_weight(self.checkpoint, name):  # a part of a product of which another part isn't int8
            q, scale = bitsandbytes.read_weight(self.checkpoint, name, rows)
            value = q * scale
        else:
            value = self._read(name, rows)
            check_finite(value)
        yield value, {"": cast(value, self.model.dtype)}

    def _read(self, name: str, rows: slice) -> np.ndarray:
        if self._transposed(name):
            value = self.checkpoint.read(name).T[rows]
        else:
            value = self.checkpoint.read_rows(name, rows.start, rows.stop)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"Expected floating point values, got {value.dtype}.")
        return value

    def _transposed(self, name: str) -> bool:
        return self.source.transposed and not bitsandbytes.is_int8_weight(self.checkpoint, name)

    def _named(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """`function(name, ...)`, whose errors name file and tensor."""
        info = self.checkpoint.tensors[name]
        try:
            result = function(name, *args)
        except ValueError as error:
            raise ValueError(f"{info.file}: tensor {name!r}: {error}") from None
        self.tell(info.nbytes)
        return result


def _outlier_rows(values: np.ndarray, columns: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The values of rows in the columns of each, in units of `scale`; int8 ones are. 0 where a column isn't used."""
    k = values.shape[1]
    found = np.take_along_axis(values, np.minimum(columns, k - 1), axis=1).astype(np.float32)
    if values.dtype != np.int8:
        usable = scale >= SMALLEST_NORMAL
        found = np.where(usable, found / np.where(usable, scale, 1), 0)
    return np.where(columns < k, found, 0).astype(np.float16)
