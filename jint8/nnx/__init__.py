"""Flax nnx: int8 copies of models, and modules with int8 weights.

Start with `quantize`, which replaces a model's layers by those of `_modules`: `_replace` goes through the copy, and
`_registry` says which layer by which. A layer that it doesn't know keeps its own code, with its products in int8
(`_own_code`). `_leaves` finds the Variables and arrays of a module.

Imports `analysis` (for `calibrate` and `check`), `_tracing`, `_trees`, `_ops` and `_core`, and no linen.
"""

from jint8._trees import flax_state as _flax_state  # noqa: F401 (tells flax.serialization of QTensor)
from jint8.nnx._calibrate import calibrate as calibrate
from jint8.nnx._calibrate import statistics as statistics
from jint8.nnx._check import check as check
from jint8.nnx._modules import Int8Einsum as Int8Einsum
from jint8.nnx._modules import Int8Embed as Int8Embed
from jint8.nnx._modules import Int8Linear as Int8Linear
from jint8.nnx._modules import Int8LinearGeneral as Int8LinearGeneral
from jint8.nnx._modules import Int8LoRALinear as Int8LoRALinear
from jint8.nnx._modules import Quantized as Quantized
from jint8.nnx._quantize import quantize as quantize
from jint8.nnx._registry import register as register
