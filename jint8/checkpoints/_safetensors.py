"""Hugging Face directories: config.json, one or many safetensors files, an index."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeGuard

import numpy as np

from jint8.checkpoints._bitsandbytes import dequantized, find_packed
from jint8.checkpoints._checkpoint import Checkpoint, Format, TensorInfo
from jint8.checkpoints._dtypes import DTYPES
from jint8.checkpoints._json import parse_json, read_json
from jint8.checkpoints._source import SourceFile
from jint8.checkpoints._tokenizer.huggingface import tokenizer_from_directory
from jint8.checkpoints._tokenizer.tokenizer import Tokenizer

INDEX = "model.safetensors.index.json"
MAX_RANK = 32  # of a tensor; NumPy has at most 64 axes
_FIELDS = ("dtype", "shape", "data_offsets")


class SafetensorsCheckpoint(Checkpoint):
    """A directory as Hugging Face's libraries write it.

    The headers are parsed here rather than by the safetensors package, whose errors don't name the tensor.
    """

    format: ClassVar[Format] = "safetensors"

    def __init__(self, path: Path):
        files, weight_map = _find_files(path)
        config = read_json(path / "config.json")
        tensors: dict[str, TensorInfo] = {}
        self._begin: dict[str, int] = {}  # of each tensor: the offset of its first byte in the file
        sources = tuple(map(SourceFile, files))
        for source in sources:
            for info, begin in read_header(source):
                if info.name in tensors:
                    first = tensors[info.name].file
                    raise ValueError(f"Expected every tensor in one file, got {info.name!r} in {first} and {info.file}")
                tensors[info.name] = info
                self._begin[info.name] = begin
        if weight_map is not None:
            _check_index(path, weight_map, tensors)
        tensors = _by_usual_names(tensors)
        self._begin = {name: self._begin[stored] for name, stored in zip(tensors, self._begin, strict=True)}
        self._stored, by_path = tensors, {source.path: source for source in sources}
        shown, self._packed = find_packed(tensors, lambda name: self._values(by_path[tensors[name].file], name))
        super().__init__(path, config=config, tensors=shown, files=sources)

    def _read_rows(self, info: TensorInfo, start: int, stop: int) -> np.ndarray:
        source = self._source(info)
        if info.name not in self._packed:
            return self._values(source, info.name, slice(start, stop))
        packed, width = self._packed[info.name], info.shape[1]
        first, last = start * width, stop * width
        begin, end = first // 2, (last + 1) // 2
        raw = source.read(self._begin[info.name] + begin, end - begin, f"tensor {info.name!r}")
        beside = lambda name: self._values(self._source(self._stored[name]), name)
        return dequantized(packed, raw, first, last - first, beside).reshape(stop - start, width)

    def _values(self, source: SourceFile, name: str, rows: slice | None = None) -> np.ndarray:
        """Rows of a tensor as it is stored; None is all of them. A scalar counts as one row."""
        info = self._stored[name]
        dtype, row_shape = DTYPES[info.dtype], info.shape[1:]
        start, stop = (0, info.shape[0] if info.shape else 1) if rows is None else (rows.start, rows.stop)
        row_bytes = math.prod(row_shape) * dtype.itemsize
        begin = self._begin[name] + start * row_bytes
        raw = source.read(begin, (stop - start) * row_bytes, f"tensor {name!r}")
        return raw.view(dtype).reshape(stop - start, *row_shape)

    def tokenizer(self) -> Tokenizer | None:
        return tokenizer_from_directory(self.path, self.config)


def _by_usual_names(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Tensors by the names that others than torchao have for them, in the same order.

    torchao's `MODULE._weight_qdata`, `_weight_scale` and `_weight_zero_point` are `MODULE.weight` in int8, and what
    stands beside it.

    Raises:
      ValueError: both are there.
    """
    usual: dict[str, TensorInfo] = {}
    for stored, info in tensors.items():
        name = re.sub(r"\._weight_(scale|zero_point)$", r".weight_\1", re.sub(r"\._weight_qdata$", ".weight", stored))
        if name in usual:
            raise ValueError(f"{info.file}: Expected every weight once, got {name!r} and {stored!r}")
        usual[name] = info if name == stored else dataclasses.replace(info, name=name)
    return usual


def _find_files(path: Path) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    """The files that hold the tensors, and the index's map from tensor to file name where there is an index."""
    # In the order in which transformers looks: an index beside a single file is a leftover.
    if (path / "model.safetensors").exists():
        return (path / "model.safetensors",), None
    if (path / INDEX).exists():
        weight_map = read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise ValueError(f"{path / INDEX}: Expected a 'weight_map' from tensor to file name, got none")
        names = list(dict.fromkeys(weight_map.values()))
        for name in names:
            if Path(name).name != name:  # "../x" would read outside of the directory
                raise ValueError(f"{path / INDEX}: Expected file names, got the path {name!r}")
            if not (path / name).exists():
                raise FileNotFoundError(f"{path / name}: Expected this file, which {INDEX} names, got none")
        return tuple(path / name for name in names), weight_map
    # Neither: any other safetensors files. Without an index only their names tell whether one is missing.
    files = tuple(sorted(path.glob("*.safetensors")))
    if not files:
        raise _no_safetensors(path)
    for file in files:
        if part := re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.safetensors", file.name):
            for i in range(1, int(part[3]) + 1):
                sibling = path / f"{part[1]}-{i:05d}-of-{part[3]}.safetensors"
                if not sibling.exists():
                    raise FileNotFoundError(f"{sibling}: Expected this file, which {file.name} implies, got none")
    return files, None


def _no_safetensors(path: Path) -> Exception:
    """The error for a directory without safetensors files, which says what to do about the files that are there."""
    if pickled := [*sorted(path.glob("*.bin")), *sorted(path.glob("*.pt")), *sorted(path.glob("*.pth"))]:
        return ValueError(
            f"{path}: Expected safetensors files, got PyTorch's {pickled[0].name}. Loading a pickle can run any code, "
            "so it is refused; convert once, where you trust it: "
            "transformers.AutoModelForCausalLM.from_pretrained(SRC).save_pretrained(DST, safe_serialization=True)"
        )
    if ggufs := sorted(path.glob("*.gguf")):
        return ValueError(f"{path}: Expected safetensors files, got GGUF: pass the file itself, {ggufs[0]}")
    return FileNotFoundError(f"{path}: Expected *.safetensors files in this directory, got none")


def _check_index(path: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    """Raise ValueError unless the index and the files' headers list the same tensors in the same files."""
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise ValueError(f"{path / file}: Expected tensor {name!r}, which {INDEX} places there, got none")
    for name, info in tensors.items():
        if name not in weight_map:
            raise ValueError(f"{info.file}: Expected only tensors that {INDEX} lists, got {name!r}")


def read_arrays(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Read one safetensors file.

    Args:
      file: the file.

    Yields:
      Each tensor's name and its values.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file isn't safetensors, is truncated, or has a type that can't be read.
      OSError: it can't be read, or is changed before the last tensor was read.
    """
    if not file.exists():
        raise FileNotFoundError(f"{file}: Expected this file, got none")
    source = SourceFile(file)
    for info, begin in read_header(source):
        raw = source.read(begin, info.nbytes, f"tensor {info.name!r}")
        yield info.name, raw.view(DTYPES[info.dtype]).reshape(info.shape)
    source.check_unchanged()


def read_header(source: SourceFile) -> list[tuple[TensorInfo, int]]:
    """Read and check the header of one safetensors file.

    Args:
      source: the file.

    Returns:
      Each tensor with the offset of its first byte in the file, in the order of the offsets.

    Raises:
      ValueError: the file isn't safetensors, is truncated, or has a type that can't be read.
      OSError: it can't be read, or has become shorter.
    """
    file, size = source.path, source.size
    length = int.from_bytes(source.read(0, min(8, size)).tobytes(), "little")
    if size < 8 or length > size - 8:
        raise ValueError(
            f"{file}: Expected a safetensors file whose header fits in it, got {length + 8} bytes of header in a "
            f"file of {size} bytes (not safetensors, or truncated)"
        )
    header = parse_json(source.read(8, length).tobytes(), file, "a safetensors header")
    entries = [(name, *_entry(e, f"{file}: tensor {name!r}")) for name, e in header.items() if name != "__metadata__"]
    # The format allows no gaps and no overlaps, so each tensor begins where the one before it ends.
    out, end = [], 0
    for name, dtype, shape, first, last in sorted(entries, key=lambda e: e[3:5]):
        where = f"{file}: tensor {name!r}"
        if dtype not in DTYPES:
            raise ValueError(f"{where}: Expected a type among {', '.join(DTYPES)}, got {dtype}")
        nbytes = math.prod(shape) * DTYPES[dtype].itemsize
        if last - first != nbytes:
            raise ValueError(f"{where}: Expected {nbytes} bytes for {dtype}{list(shape)}, got {last - first}")
        if first != end:
            raise ValueError(f"{where}: Expected its data to start at byte {end}, where the last one ends, got {first}")
        end = last
        if 8 + length + end > size:
            raise ValueError(f"{where}: Expected at least {8 + length + end} bytes, got {size} (truncated file)")
        info = TensorInfo(name=name, shape=shape, dtype=dtype, file=file, nbytes=nbytes)
        out.append((info, 8 + length + first))
    if 8 + length + end != size:
        raise ValueError(f"{file}: Expected {8 + length + end} bytes, got {size} (bytes that belong to no tensor)")
    return out


def _entry(entry: Any, where: str) -> tuple[str, tuple[int, ...], int, int]:
    """Dtype, shape, first byte and end of a tensor, as the header says them.

    Raises:
      ValueError: something else than a string, a shape that NumPy can have, and two offsets; the message begins with
        `where`.
    """
    dtype, shape, offsets = map(entry.get, _FIELDS) if isinstance(entry, dict) else (None, None, None)
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        # Nothing of the entry is quoted, which may be as large as the file.
        raise ValueError(f"{where}: Expected {', '.join(_FIELDS)}, in numbers from 0 to 2**63 - 1, got another entry")
    if len(shape) > MAX_RANK:
        raise ValueError(f"{where}: Expected at most {MAX_RANK} axes, got {len(shape)}")
    if 0 in shape and math.prod(n for n in shape if n) >= 2**59:  # NumPy refuses these although they have no elements
        raise ValueError(f"{where}: Expected a shape that NumPy can have, got {shape}")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)
