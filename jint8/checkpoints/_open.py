"""From a path to the reader for what lies there."""

import os
from pathlib import Path

from jint8.checkpoints._checkpoint import Checkpoint
from jint8.checkpoints._destination import check_complete
from jint8.checkpoints._gguf.checkpoint import GGUFCheckpoint
from jint8.checkpoints._jint8 import METADATA, Jint8Checkpoint
from jint8.checkpoints._safetensors import SafetensorsCheckpoint


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a model checkpoint for reading.

    Headers are read and checked here (every tensor lies within its file, names are known); values only when asked for.
    Leaving the `with` statement raises OSError where a file was changed meanwhile.

    Args:
      path: a GGUF file (of a split model: any of its files), a Hugging Face directory with `config.json` and one
        or many safetensors files, or a directory that `jint8.save` wrote.

    Returns:
      The checkpoint; use it in a `with` statement.

    Raises:
      FileNotFoundError: there is nothing at `path`, or a file that belongs to the checkpoint is missing.
      ValueError: what is there isn't a checkpoint that can be read; the message names file and tensor.
      ImportError: a package of the `hf` extra is missing.

    Examples:
      >>> import json, pathlib, struct, tempfile
      >>> import numpy as np
      >>> from jint8.checkpoints import open_checkpoint
      >>> directory = pathlib.Path(tempfile.mkdtemp())
      >>> _ = (directory / "config.json").write_text('{"model_type": "llama"}')
      >>> header = json.dumps({"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
      >>> values = np.arange(6, dtype=np.float32).tobytes()
      >>> _ = (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + values)
      >>> with open_checkpoint(directory) as ckpt:
      ...     print(ckpt.format, ckpt.config["model_type"], ckpt.tensors["w"].shape, ckpt.read_rows("w", 1, 2))
      safetensors llama (2, 3) [[3. 4. 5.]]
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"Expected a GGUF file or a directory with safetensors files, got no file: {path}")
    if path.is_dir():
        check_complete(path)
    if (path / METADATA).exists():
        return Jint8Checkpoint(path)
    if path.is_dir():
        return SafetensorsCheckpoint(path)
    if path.suffix == ".safetensors":
        raise ValueError(
            f"{path}: Expected a directory with config.json and safetensors files, got one file: "
            f"pass the directory {path.parent}"
        )
    return GGUFCheckpoint(path)
