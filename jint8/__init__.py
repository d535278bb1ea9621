"""LLM.int8() for JAX: int8 matrix multiplication with 16-bit outliers, for Flax transformers.

This file is the API: names and where they are. `import jint8` doesn't import flax; what needs it is imported when it is
first used. Start with `quantize` and `matmul` (one array), `quantize_params` and `apply` (a Flax model), or `load` (a
checkpoint). Each package's docstring says what it does, what it may import, and where to start reading.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from jint8._core import static_fields as _static  # noqa: F401 (registers QTensor with jax.export)
from jint8._core.config import SCHEMES as SCHEMES
from jint8._core.config import Config as Config
from jint8._core.config import Scheme as Scheme
from jint8._core.qtensor import QTensor as QTensor
from jint8._core.qtensor import dequantize as dequantize
from jint8._core.quantize import quantize as quantize
from jint8._ops.activations import find_outliers as find_outliers
from jint8._ops.dot_general import dot_general as dot_general
from jint8._ops.einsum import einsum as einsum
from jint8._ops.export import export as export
from jint8._ops.matmul import matmul as matmul
from jint8._ops.product import IMPLEMENTATIONS as IMPLEMENTATIONS
from jint8._ops.ragged_dot import ragged_dot as ragged_dot
from jint8._tracing.plan import Plan as Plan
from jint8._tracing.plan import plan as plan
from jint8._trees.memory import MemoryReport as MemoryReport
from jint8._trees.memory import memory_report as memory_report
from jint8._trees.params import OUTPUT_HEADS as OUTPUT_HEADS
from jint8._trees.params import dequantize_params as dequantize_params
from jint8._trees.params import quantize_params as quantize_params
from jint8._trees.params import with_config as with_config
from jint8._trees.sharding import shardings as shardings
from jint8.analysis._calibrate import calibrate as calibrate
from jint8.analysis._check import check as check

if TYPE_CHECKING:
    from jint8._inference.evaluate import evaluate as evaluate
    from jint8._inference.language_model import LanguageModel as LanguageModel
    from jint8._inference.load import load as load
    from jint8._inference.load import load_encoder as load_encoder
    from jint8._inference.merge import merge_adapter as merge_adapter
    from jint8._inference.save import save as save
    from jint8._inference.text_encoder import TextEncoder as TextEncoder
    from jint8.linen import apply as apply

__version__ = "0.1.0"

# A pickle names the module of each class. Those that an earlier version wrote have these names.
sys.modules["jint8._types"] = sys.modules["jint8._core.qtensor"]
sys.modules["jint8._plan"] = sys.modules["jint8._tracing.plan"]
sys.modules["jint8._params"] = sys.modules["jint8._trees.params"]

# flax.serialization has to know how a QTensor is saved. Where flax is in use, tell it now; the parts of jint8 that
# import flax tell it otherwise.
if "flax" in sys.modules:
    importlib.import_module("jint8._trees.flax_state")

# By name, the module that is imported when the name is first used, because it imports flax.
_LAZY = {
    "LanguageModel": "jint8._inference.language_model",
    "TextEncoder": "jint8._inference.text_encoder",
    "apply": "jint8.linen",
    "evaluate": "jint8._inference.evaluate",
    "load": "jint8._inference.load",
    "load_encoder": "jint8._inference.load",
    "merge_adapter": "jint8._inference.merge",
    "save": "jint8._inference.save",
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
