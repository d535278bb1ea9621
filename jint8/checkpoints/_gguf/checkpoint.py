"""GGUF checkpoints: llama.cpp's files with Hugging Face's names, shapes and row order."""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np

from jint8.checkpoints._checkpoint import Checkpoint, Groups, TensorInfo
from jint8.checkpoints._dtypes import DTYPES
from jint8.checkpoints._gguf.architectures import ARCHITECTURES, Architecture
from jint8.checkpoints._gguf.config import config_from_metadata
from jint8.checkpoints._gguf.four_bits import BLOCK_BYTES, GROUP, groups_of
from jint8.checkpoints._gguf.header import GGUFFile, RawTensor, read_header
from jint8.checkpoints._gguf.names import CONFIG_TENSORS, hf_name, stem
from jint8.checkpoints._optional import require
from jint8.checkpoints._source import SourceFile
from jint8.checkpoints._tokenizer.gguf import tokenizer_from_metadata
from jint8.checkpoints._tokenizer.tokenizer import Tokenizer


class GGUFCheckpoint(Checkpoint):
    """A GGUF file, or the files of a split one.

    Attributes:
      metadata: the file's own key-value pairs (of a split model, those of the first file).
    """

    format = "gguf"

    def __init__(self, path: Path):
        sources = tuple(map(SourceFile, _split_files(path)))
        parts = [read_header(source) for source in sources]
        self._gguf = require("gguf")
        self.metadata = parts[0].metadata
        arch = self.metadata.get("general.architecture")
        if arch not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(f"{parts[0].path}: Expected an architecture among {known}, got {arch!r}")
        self._architecture: Architecture = ARCHITECTURES[arch]
        if self._architecture.with_experts is not None and self.metadata.get(f"{arch}.expert_count"):
            self._architecture = self._architecture.with_experts
        self._begin: dict[str, int] = {}  # of each tensor: the offset of its first byte in its file
        self._stems: dict[str, str] = {}  # of each tensor: what llama.cpp calls it, such as "attn_q"
        self._sources = {source.path: source for source in sources}  # which tensors are read from below already
        infos = [info for part in parts for info in self._infos(part)]
        tensors = {info.name: info for info in infos}
        if len(tensors) != len(infos):
            twice = next(i.name for i in infos if tensors[i.name] is not i)
            raise ValueError(f"{path}: Expected every tensor once, got {twice!r} twice")
        names = {stem: f"{self._architecture.names[stem]}.weight" for stem in ("token_embd", "output_norm", "output")}
        for name in (names["token_embd"], names["output_norm"]):
            if name not in tensors:
                raise ValueError(f"{path}: Expected a tensor {name!r}, got none")
        # What Hugging Face has in config.json isn't a tensor of the checkpoint.
        rope = {name: self._read_rows(t, 0, t.shape[0]) for name in CONFIG_TENSORS if (t := tensors.pop(name, None))}
        # Before anything is made for each layer: a damaged number may be any.
        if isinstance(layers := self.metadata.get(f"{arch}.block_count"), int) and layers > len(tensors):
            raise ValueError(f"{path}: Expected {arch}.block_count to be at most {len(tensors)} tensors, got {layers}")
        config = config_from_metadata(
            self.metadata,
            self._architecture,
            path=parts[0].path,
            vocab_size=tensors[names["token_embd"]].shape[0],
            tied=names["output"] not in tensors,
            tensors=tensors,
            rope_tensors=rope,
        )
        super().__init__(path, config=config, tensors=tensors, files=sources)
        for info in self.tensors.values():
            self._row_order(info)  # checks that the rows are whole heads

    def _infos(self, part: GGUFFile) -> list[TensorInfo]:
        """The tensors of one file as Hugging Face has them: a stack of experts is one tensor for each expert."""
        infos = []
        for raw in part.tensors:
            where = f"{part.path}: tensor {raw.name!r}"
            name = raw.name if raw.name in CONFIG_TENSORS else hf_name(raw.name, self._architecture)
            if name is None:
                arch = self.metadata["general.architecture"]
                raise ValueError(f"{where}: Expected a tensor of the architecture {arch}, got an unknown name")
            dtype, nbytes = self._type(raw, where)
            if raw.begin + nbytes > part.size:
                raise ValueError(
                    f"{where}: Expected at least {raw.begin + nbytes} bytes, got {part.size} (truncated file)"
                )
            shape, count, kind = raw.shape, 1, stem(raw.name)
            if kind in self._architecture.experts:
                if len(shape) != 3 or not shape[0]:
                    raise ValueError(f"{where}: Expected experts of shape (e, n, k), got {shape}")
                count, shape = shape[0], shape[1:]
            elif kind in self._architecture.transposed and len(shape) == 2:
                shape = shape[::-1]
            for e in range(count):
                one, each = name.replace("{e}", str(e)), nbytes // count
                infos.append(TensorInfo(name=one, shape=shape, dtype=dtype, file=part.path, nbytes=each))
                self._begin[one] = raw.begin + e * each
                self._stems[one] = kind
        return infos

    def _type(self, raw: RawTensor, where: str) -> tuple[str, int]:
        """The name of a tensor's type, and its bytes."""
        try:
            kind = self._gguf.GGMLQuantizationType(raw.type)
            block, block_bytes = self._gguf.GGML_QUANT_SIZES[kind]
            if kind.name not in DTYPES:
                self._gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except (ValueError, KeyError, NotImplementedError) as e:
            raise ValueError(f"{where}: Expected a type that the gguf package can dequantize, got {e}") from e
        if block > 1 and (len(raw.shape) < 2 or raw.shape[-1] % block):
            raise ValueError(
                f"{where}: Expected rows of a multiple of {block} values for {kind.name}, got shape {raw.shape}"
            )
        return kind.name, math.prod(raw.shape) // block * block_bytes

    def group(self, name: str) -> int | None:
        return GROUP if self._info(name).dtype in BLOCK_BYTES else None

    def read_groups(self, name: str, start: int, stop: int) -> Groups:
        if self.group(name) is None:
            return super().read_groups(name, start, stop)
        info = self._stored(self._info(name))
        with np.errstate(all="ignore"):  # as in `_stored_rows`
            return groups_of(self._raw_rows(info, start, stop), info.dtype)

    def _stored(self, info: TensorInfo) -> TensorInfo:
        """A tensor in the file's orientation, which is `[out, in]` also where Hugging Face's isn't."""
        transposed = self._stems[info.name] in self._architecture.transposed and len(info.shape) == 2
        return dataclasses.replace(info, shape=info.shape[::-1]) if transposed else info

    def _read_rows(self, info: TensorInfo, start: int, stop: int) -> np.ndarray:
        stored = self._stored(info)
        if stored is info:
            return self._stored_rows(info, start, stop)
        # Hugging Face's rows are the file's columns, which lie in every row of the file: read all of them.
        return self._stored_rows(stored, 0, stored.shape[0]).T[start:stop]

    def _raw_rows(self, info: TensorInfo, start: int, stop: int) -> np.ndarray:
        """The bytes of rows in the file's orientation, in Hugging Face's order, `[n, bytes]`."""
        # Block-quantized types have whole blocks in each row, so that rows of bytes can be picked before dequantizing.
        order = self._row_order(info)
        picked = None if order is None else order[start:stop]
        if picked is not None and len(picked):
            start, stop = int(picked.min()), int(picked.max()) + 1
        row_bytes = info.nbytes // max(info.shape[0] if info.shape else 1, 1)
        begin = self._begin[info.name] + start * row_bytes
        raw = self._source(info).read(begin, (stop - start) * row_bytes, f"tensor {info.name!r}")
        raw = raw.reshape(stop - start, row_bytes)
        return raw if picked is None else raw[picked - start]

    def _stored_rows(self, info: TensorInfo, start: int, stop: int) -> np.ndarray:
        """Rows in the file's orientation, in Hugging Face's order."""
        raw = self._raw_rows(info, start, stop)
        shape = (len(raw), *info.shape[1:])
        if info.dtype in DTYPES:
            values = raw.reshape(-1).view(DTYPES[info.dtype]).reshape(shape)
        else:
            kind = self._gguf.GGMLQuantizationType[info.dtype]
            with np.errstate(all="ignore"):  # a damaged scale gives NaN, which quantization reports with the name
                values = self._gguf.quants.dequantize(raw, kind).reshape(shape)
        if self._architecture.unit_norms and info.name.endswith("norm.weight"):
            values = values - np.ones((), values.dtype)
        return values

    def _row_order(self, info: TensorInfo) -> np.ndarray | None:
        """Which stored row is each of Hugging Face's, or None where the order is the same."""
        kind = self._stems[info.name]
        heads = self.metadata[f"{self.metadata['general.architecture']}.attention.head_count"]
        if self._architecture.rotary_pairs and kind in ("attn_q", "attn_k"):
            heads = heads if kind == "attn_q" else self.config["num_key_value_heads"]
            parts = 2 * heads
        elif kind == self._architecture.interleaved:
            parts = 3 * heads
        else:
            return None
        if not info.shape or info.shape[0] % parts:
            raise ValueError(
                f"{info.file}: tensor {info.name!r}: Expected rows for {heads} heads, got shape {info.shape}"
            )
        if kind == self._architecture.interleaved:
            # all queries, all keys, all values -> each head's query, key and value
            return np.arange(info.shape[0]).reshape(3, heads, -1).swapaxes(0, 1).reshape(-1)
        # in each head: neighbours (0, 1), (2, 3), ... are a rotary pair -> first all first ones, then all second ones
        return np.arange(info.shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)

    def tokenizer(self) -> Tokenizer | None:
        return tokenizer_from_metadata(self.metadata, path=self.path)


def _split_files(path: Path) -> list[Path]:
    """The files of a split model, of which `path` is one; or `path` alone."""
    part = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name)
    if part is None:
        return [path]
    files = [path.with_name(f"{part[1]}-{i:05d}-of-{part[2]}.gguf") for i in range(1, int(part[2]) + 1)]
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{file}: Expected this file, which {path.name} implies, got none")
    return files
