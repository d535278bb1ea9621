"""One GGUF file: its metadata and where its tensors lie.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3. The `gguf` package's
own reader makes several NumPy views per string, seconds and hundreds of megabytes for a vocabulary, and doesn't notice
a truncated file; so the headers are read here, and the package is used for the block types.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

MAGIC = b"GGUF"
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
    metadata: Mapping[str, Any]
    tensors: tuple[RawTensor, ...]


def read_header(path: Path) -> GGUFFile:
    """Read the metadata and the list of tensors of one file.

    Args:
      path: the file.

    Returns:
      Its header. That the data lie within the file is for the caller to check, who knows the types' sizes.

    Raises:
      ValueError: it isn't a GGUF file of a known version, or ends within the header.
    """
    size = path.stat().st_size
    with path.open("rb") as f:
        magic = f.read(4)
        if magic != MAGIC:
            raise ValueError(f"{path}: Expected a GGUF file (which begins with {MAGIC!r}), got {magic!r}")
        if size < 24:
            raise ValueError(f"{path}: Expected a GGUF header of 24 bytes, got a file of {size} bytes (truncated)")
        with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Reader(path, data).header()
            except (struct.error, UnicodeDecodeError, OverflowError) as e:
                raise ValueError(
                    f"{path}: Expected a complete GGUF header, got one that doesn't parse (truncated or damaged): {e}"
                ) from e


class _Reader:
    """A position in the memory-mapped file that moves on with every value read.

    Each method reads one thing of the format's grammar. A length beyond the end of the file raises struct.error before
    anything larger than the file is allocated.
    """

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, 4

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
        return GGUFFile(self.path, metadata, tensors)

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        raw = self.data[self.at : self.at + length]
        if len(raw) != length:
            raise struct.error(f"a string of {length} bytes at byte {self.at} goes past the end")
        self.at += length
        return raw.decode("utf-8")

    def value(self, kind: int, key: str) -> Any:
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind != ARRAY:
            raise ValueError(f"{self.path}: Expected {key!r} of a known type, got type {kind}")
        kind, length = self.scalar("I"), self.scalar("Q")
        if length > len(self.data):
            raise struct.error(f"an array of {length} values at byte {self.at} goes past the end")
        if kind in SCALARS:
            code = f"<{length}{SCALARS[kind]}"
            values = struct.unpack_from(code, self.data, self.at)
            self.at += struct.calcsize(code)
            return list(values)
        return [self.value(kind, key) for _ in range(length)]

    def tensor(self) -> RawTensor:
        name = self.string()
        rank = self.scalar("I")
        if rank > 4:
            raise ValueError(f"{self.path}: tensor {name!r}: Expected at most 4 axes, got {rank}")
        shape = tuple(self.scalar("Q") for _ in range(rank))[::-1]
        return RawTensor(name, shape, self.scalar("I"), self.scalar("Q"))
