"""LLM.int8() for JAX: int8 matrix multiplication with 16-bit outliers, for Flax transformers."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from jint8 import _static  # noqa: F401 (registers QTensor with jax.export)
from jint8._calibrate import calibrate as calibrate
from jint8._contract import dot_general as dot_general
from jint8._contract import einsum as einsum
from jint8._export import export as export
from jint8._matmul import IMPLEMENTATIONS as IMPLEMENTATIONS
from jint8._matmul import matmul as matmul
from jint8._outliers import find_outliers as find_outliers
from jint8._params import OUTPUT_HEADS as OUTPUT_HEADS
from jint8._params import MemoryReport as MemoryReport
from jint8._params import dequantize_params as dequantize_params
from jint8._params import memory_report as memory_report
from jint8._params import quantize_params as quantize_params
from jint8._params import with_config as with_config
from jint8._plan import Plan as Plan
from jint8._plan import plan as plan
from jint8._quantize import dequantize as dequantize
from jint8._quantize import quantize as quantize
from jint8._ragged import ragged_dot as ragged_dot
from jint8._sharding import shardings as shardings
from jint8._types import SCHEMES as SCHEMES
from jint8._types import Config as Config
from jint8._types import QTensor as QTensor

if TYPE_CHECKING:
    from jint8._language_model import LanguageModel as LanguageModel
    from jint8._load import load as load
    from jint8._load import load_encoder as load_encoder
    from jint8._save import save as save
    from jint8._text_encoder import TextEncoder as TextEncoder
    from jint8.linen import apply as apply

__version__ = "0.1.0"

if "flax" in sys.modules:  # flax.serialization then knows QTensor before the first one is made
    importlib.import_module("jint8._flax_state")

# Imported when first used, because they import flax.
_LAZY = {
    "LanguageModel": "jint8._language_model",
    "TextEncoder": "jint8._text_encoder",
    "apply": "jint8.linen",
    "load": "jint8._load",
    "load_encoder": "jint8._load",
    "save": "jint8._save",
}
_LAZY_MODULES = ("analysis", "checkpoints", "linen", "models", "nnx")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _LAZY_MODULES:
        return importlib.import_module(f"jint8.{name}")
    raise AttributeError(f"module 'jint8' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_LAZY_MODULES} - {"TYPE_CHECKING", "Any", "importlib", "sys"})
