"""One GGUF file: its metadata and where its tensors lie.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3. The `gguf` package's
own reader makes several NumPy views per string, seconds and hundreds of megabytes for a vocabulary, and doesn't notice
a truncated file; so the headers are read here, and the package is used for the block types.
"""

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jint8.checkpoints._source import SourceFile

MAGIC = b"GGUF"
PART = 2**20  # bytes that are read at once
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9  # types of metadata values, as those in SCALARS, which have struct's codes
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class RawTensor(NamedTuple):
    """A tensor as the file describes it."""

    name: str
    shape: tuple[int, ...]  # the slowest axis first: the reverse of the file's order
    type: int  # a GGMLQuantizationType
    begin: int  # offset from the start of the file


class GGUFFile(NamedTuple):
    """The header of one file."""

    path: Path
    size: int  # in bytes
    metadata: Mapping[str, Any]
    tensors: tuple[RawTensor, ...]


def read_header(source: SourceFile) -> GGUFFile:
    """Read the metadata and the list of tensors of one file.

    Args:
      source: the file.

    Returns:
      Its header. That the data lie within the file is for the caller to check, who knows the types' sizes.

    Raises:
      ValueError: it isn't a GGUF file of a known version, or ends within the header.
      OSError: it can't be read, or has become shorter.
    """
    path, size = source.path, source.size
    magic = source.read(0, min(4, size)).tobytes()
    if magic != MAGIC:
        raise ValueError(f"{path}: Expected a GGUF file (which begins with {MAGIC!r}), got {magic!r}")
    if size < 24:
        raise ValueError(f"{path}: Expected a GGUF header of 24 bytes, got a file of {size} bytes (truncated)")
    try:
        return _Reader(source).header()
    except (struct.error, UnicodeDecodeError, OverflowError, RecursionError) as e:
        raise ValueError(
            f"{path}: Expected a complete GGUF header, got one that doesn't parse (truncated or damaged): {e}"
        ) from e


class _Reader:
    """A position in the file that moves on with every value read.

    Each method reads one thing of the format's grammar. A length beyond the end of the file raises struct.error before
    anything larger than the file is allocated.
    """

    def __init__(self, source: SourceFile):
        self.source, self.path, self.at = source, source.path, 4
        self.data, self.begin = b"", 0  # a part of the file, and where it begins

    def take(self, count: int) -> bytes:
        if count > self.source.size - self.at:
            raise struct.error(f"{count} bytes at byte {self.at} go past the end")
        first = self.at - self.begin
        if first + count > len(self.data):
            self.begin, first = self.at, 0
            self.data = self.source.read(self.at, min(max(count, PART), self.source.size - self.at)).tobytes()
        self.at += count
        return self.data[first : first + count]

    def header(self) -> GGUFFile:
        version = self.scalar("I")
        if version not in VERSIONS:
            hint = " (a big-endian file)" if version & 0xFFFF == 0 else ""  # 3 reads as 0x03000000 there
            raise ValueError(
                f"{self.path}: Expected GGUF version {' or '.join(map(str, VERSIONS))}, got {version}{hint}"
            )
        n_tensors, n_keys = self.scalar("Q"), self.scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self.string()
            if key in metadata:
                raise ValueError(f"{self.path}: Expected every key once, got {key!r} twice")
            metadata[key] = self.value(self.scalar("I"), key)
        entries = [self.tensor() for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"{self.path}: Expected a positive general.alignment, got {alignment!r}")
        # The tensors' offsets count from the end of the header, rounded up to the alignment.
        start = math.ceil(self.at / alignment) * alignment
        tensors = tuple(t._replace(begin=start + t.begin) for t in entries)
        return GGUFFile(self.path, self.source.size, metadata, tensors)

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))
        return value

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8")

    def value(self, kind: int, key: str) -> Any:
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind != ARRAY:
            raise ValueError(f"{self.path}: Expected {key!r} of a known type, got type {kind}")
        kind, length = self.scalar("I"), self.scalar("Q")
        if length > self.source.size:
            raise struct.error(f"an array of {length} values at byte {self.at} goes past the end")
        if kind in SCALARS:
            code = f"<{length}{SCALARS[kind]}"
            return list(struct.unpack(code, self.take(struct.calcsize(code))))
        return [self.value(kind, key) for _ in range(length)]

    def tensor(self) -> RawTensor:
        name = self.string()
        rank = self.scalar("I")
        if rank > 4:
            raise ValueError(f"{self.path}: tensor {name!r}: Expected at most 4 axes, got {rank}")
        shape = tuple(self.scalar("Q") for _ in range(rank))[::-1]
        return RawTensor(name, shape, self.scalar("I"), self.scalar("Q"))
