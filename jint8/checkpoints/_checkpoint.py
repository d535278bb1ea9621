"""What every checkpoint offers, whatever its file format."""

import abc
import dataclasses
import math
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np

from jint8.checkpoints._source import SourceFile
from jint8.checkpoints._tokenizer.tokenizer import Tokenizer

Format = Literal["gguf", "safetensors", "jint8"]
READ_AHEAD = 2**30  # bytes: as much as is read while a model is traced, and not so much that it fills the cache


class Groups(NamedTuple):
    """Rows of a tensor in four bits: each value is `step * code + low` of its group.

    Attributes:
      codes: uint8 `[n, k]`, from 0 to 15.
      step: float32 `[n, k / group]`; negative ones occur.
      low: float32 of the same shape.
    """

    codes: np.ndarray
    step: np.ndarray
    low: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What is known of a tensor before it is read.

    Attributes:
      name: its Hugging Face name, such as `model.layers.0.self_attn.q_proj.weight`.
      shape: its shape as Hugging Face has it (`[out, in]` for a projection).
      dtype: the type in the file, by the format's own name: `BF16`, `F32`, `I8`, `Q4_1`, ...
      file: the file that holds it.
      nbytes: its bytes in the file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    nbytes: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Checkpoint(abc.ABC):
    """An open checkpoint: configuration, tensors by name, tokenizer.

    Opening one reads and checks the headers only. Values are read when they are asked for, into memory of their own.
    It is a context manager; leaving it raises OSError where a file was changed since the checkpoint was opened.

    Attributes:
      path: what was opened.
      format: `"gguf"`, `"safetensors"` or `"jint8"`.
      config: the model's configuration with the keys of a Hugging Face `config.json`.
      tensors: every tensor by its Hugging Face name, in the order of the files.
      files: the files that hold the tensors.
    """

    format: ClassVar[Format]

    def __init__(
        self, path: Path, *, config: dict[str, Any], tensors: Mapping[str, TensorInfo], files: tuple[SourceFile, ...]
    ):
        self.path = path
        self.config = config
        self.tensors = types.MappingProxyType(dict(tensors))
        self.files = tuple(file.path for file in files)
        self._sources: dict[Path, SourceFile] | None = {file.path: file for file in files}  # None once closed

    @property
    def file_bytes(self) -> int:
        """Total size of the files that hold the tensors."""
        return sum(f.stat().st_size for f in self.files)

    def read(self, name: str) -> np.ndarray:
        """Read one tensor.

        Args:
          name: a key of `tensors`.

        Returns:
          The values as they are stored: floats (bfloat16 is that of ml_dtypes) or integers. Block-quantized types of
          GGUF are dequantized to float32.

        Raises:
          KeyError: there is no such tensor.
          OSError: it can't be read, or the file has become too short.
        """
        info = self._info(name)
        if not info.shape:
            return self._read_rows(info, 0, 1).reshape(())
        return self._read_rows(info, 0, info.shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read rows `start:stop` (of the first axis) of one tensor; the rest isn't touched.

        Args:
          name: a key of `tensors`.
          start: first row.
          stop: one past the last row.

        Returns:
          The values, as from `read`.

        Raises:
          KeyError: there is no such tensor.
          ValueError: the rows aren't in the tensor.
          OSError: they can't be read, or the file has become too short.
        """
        info = self._info(name)
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise ValueError(
                f"{info.file}: tensor {name!r}: Expected rows within a tensor of shape {info.shape}, got {start}:{stop}"
            )
        return self._read_rows(info, start, stop)

    def group(self, name: str) -> int | None:
        """How many neighbours in a row share a step and a minimum in a tensor of four bits; None for other tensors.

        Args:
          name: a key of `tensors`.

        Returns:
          The number, or None.
        """
        del name
        return None

    def read_groups(self, name: str, start: int, stop: int) -> Groups:
        """Read rows of a tensor in four bits, `[out, in]` whatever the order of a float tensor is, without rounding.

        Args:
          name: a key of `tensors` that has a `group`.
          start: first row.
          stop: one past the last row.

        Returns:
          Codes, steps and minima.

        Raises:
          ValueError: the tensor isn't in four bits.
          OSError: it can't be read, or the file has become too short.
        """
        raise ValueError(f"{self.path}: tensor {name!r}: Expected a tensor in four bits, got another one")

    @abc.abstractmethod
    def tokenizer(self) -> Tokenizer | None:
        """Build the tokenizer.

        Returns:
          The tokenizer, or None where the checkpoint has none.

        Raises:
          ValueError: there is one of a kind that isn't known.
        """

    @abc.abstractmethod
    def _read_rows(self, info: TensorInfo, start: int, stop: int) -> np.ndarray:
        """Rows `start:stop` of a tensor, which are known to be in it; a scalar counts as one row."""

    def read_ahead(self) -> None:
        """Have the system begin to read the files, as someone does who is going to read all values in their order."""
        left = READ_AHEAD
        for file in (self._sources or {}).values():
            if left > 0:
                file.read_ahead(min(left, file.size))
            left -= file.size

    def check_unchanged(self) -> None:
        """Check that what was read is what the files hold.

        Raises:
          OSError: a file was written to, replaced or removed since the checkpoint was opened.
        """
        for file in (self._sources or {}).values():
            file.check_unchanged()

    def close(self) -> None:
        """Release the files; nothing can be read afterwards."""
        self._sources = None

    def _source(self, info: TensorInfo) -> SourceFile:
        """The file of a tensor."""
        if self._sources is None:
            raise ValueError(f"{self.path}: Expected an open checkpoint, got a closed one")
        return self._sources[info.file]

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise KeyError(f"{self.path}: Expected one of {len(self.tensors)} tensors, got {name!r}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            # A change explains values that can't be used, too.
            if kind is None or issubclass(kind, ValueError):
                self.check_unchanged()
        finally:
            self.close()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({str(self.path)!r}, {self.config.get('model_type')}, {len(self.tensors)} tensors)"
        )
