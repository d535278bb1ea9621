"""What is compared: one row of the table each, and the engine that runs it."""

from __future__ import annotations

import dataclasses
from typing import Any

BASELINE = "jint8, float32"
ENGINES = ("jint8", "llama_cpp", "ctranslate2", "torch", "onnxruntime")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A way to run the model.

    Attributes:
      name: in the table.
      engine: the module `with_ENGINE.py`, and the key of `--python`.
      options: arguments of its `Engine`.
      head: how the output head is multiplied, which is a fifth of this model's weights.
      optional: run only when asked for.
    """

    name: str
    engine: str
    head: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    optional: bool = False


ROWS = (
    Row(name=BASELINE, engine="jint8", options={"quantize": False}, head="float32"),
    Row(name="jint8, threshold 6", engine="jint8", options={"threshold": 6.0}, head="float32"),
    Row(name="jint8, threshold 0", engine="jint8", options={"threshold": 0.0}, head="float32"),
    Row(
        name="jint8, threshold 6, int8 head",
        engine="jint8",
        options={"threshold": 6.0, "include": "embedding"},
        head="int8",
    ),
    Row(
        name="jint8, threshold 0, int8 head",
        engine="jint8",
        options={"threshold": 0.0, "include": "embedding"},
        head="int8",
    ),
    Row(name="llama.cpp, Q8_0", engine="llama_cpp", head="int8"),
    Row(name="CTranslate2, int8", engine="ctranslate2", head="int8"),
    Row(name="ONNX Runtime, dynamic int8", engine="onnxruntime", head="int8"),
    Row(name="PyTorch, float32", engine="torch", head="float32"),
    Row(name="bitsandbytes, threshold 6", engine="torch", options={"quantization": "bitsandbytes"}, head="float32"),
    Row(name="torchao, dynamic int8, eager", engine="torch", options={"quantization": "torchao"}, head="int8"),
    Row(
        name="torchao, dynamic int8, compiled",
        engine="torch",
        options={"quantization": "torchao", "compiled": True},
        head="int8",
        optional=True,
    ),
)
