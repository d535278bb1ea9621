"""What every checkpoint offers, whatever its file format."""

import abc
import dataclasses
import math
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from jint8.checkpoints._tokenizer.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What is known of a tensor before it is read.

    Attributes:
        name: Its Hugging Face name, such as `model.layers.0.self_attn.q_proj.weight`.
        shape: Its shape as Hugging Face has it (`[out, in]` for a projection).
        dtype: The type in the file, by the format's own name: `BF16`, `F32`, `I8`, `Q4_1`, ...
        file: The file that holds it.
        nbytes: Its bytes in the file.
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

    Everything in the headers has been checked when one exists; values are read (from mapped memory) when asked for.
    It is a context manager; arrays that were read stay valid after it has been closed.

    Attributes:
        path: What was opened.
        format: `"gguf"`, `"safetensors"` or `"jint8"`.
        config: The model's configuration with the keys of a Hugging Face `config.json`.
        tensors: Every tensor by its Hugging Face name, in the order of the files.
        files: The files that hold the tensors.
    """

    format: ClassVar[str]

    def __init__(
        self, path: Path, *, config: dict[str, Any], tensors: Mapping[str, TensorInfo], files: tuple[Path, ...]
    ):
        self.path = path
        self.config = config
        self.tensors = types.MappingProxyType(dict(tensors))
        self.files = files

    @property
    def file_bytes(self) -> int:
        """Total size of the files that hold the tensors."""
        return sum(f.stat().st_size for f in self.files)

    def read(self, name: str) -> np.ndarray:
        """Read one tensor.

        Args:
            name: A key of `tensors`.

        Returns:
            The values: float32, float16, bfloat16 (of ml_dtypes) or integers as they are stored, read-only and still
            in the file's mapped memory where possible; float32 for the block-quantized types of GGUF.

        Raises:
            KeyError: If there is no such tensor.
        """
        info = self._info(name)
        if not info.shape:
            return self._read_rows(info, 0, 1).reshape(())
        return self._read_rows(info, 0, info.shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read rows `start:stop` (of the first axis) of one tensor; the rest isn't touched.

        Args:
            name: A key of `tensors`.
            start: First row.
            stop: One past the last row.

        Returns:
            The values, as from `read`.

        Raises:
            KeyError: If there is no such tensor.
            ValueError: If the rows aren't in the tensor.
        """
        info = self._info(name)
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise ValueError(
                f"{info.file}: tensor {name!r}: Expected rows within a tensor of shape {info.shape}, got {start}:{stop}"
            )
        return self._read_rows(info, start, stop)

    @abc.abstractmethod
    def tokenizer(self) -> Tokenizer | None:
        """Build the tokenizer.

        Returns:
            The tokenizer, or None where the checkpoint has none.

        Raises:
            ValueError: If there is one of a kind that isn't known.
        """

    @abc.abstractmethod
    def _read_rows(self, info: TensorInfo, start: int, stop: int) -> np.ndarray:
        """Rows `start:stop`; a scalar is given as one row."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of the mapped files."""

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise KeyError(f"{self.path}: no tensor {name!r} among {len(self.tensors)} tensors") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({str(self.path)!r}, {self.config.get('model_type')}, {len(self.tensors)} tensors)"
        )
