"""Flax linen: int8 weights under unchanged modules, and modules with int8 weights of their own.

Start with `apply`. It runs a model under an interceptor (`_registry`), which gives each layer with an int8 weight to
its handler (`_handlers` has those of standard layers) or runs the layer's own code with its products in int8
(`_own_code`, which reaches into Flax through `_scope`). `_modules` and `_block` are layers for models that are written
for int8.

Imports `_tracing`, `_trees`, `_ops` and `_core`, and no nnx.
"""

from jint8._trees import flax_state as _flax_state  # noqa: F401 (tells flax.serialization of QTensor)
from jint8.linen import _handlers as _handlers
from jint8.linen._apply import apply as apply
from jint8.linen._block import Int8TransformerBlock as Int8TransformerBlock
from jint8.linen._modules import Int8Dense as Int8Dense
from jint8.linen._modules import Int8DenseGeneral as Int8DenseGeneral
from jint8.linen._registry import param as param
from jint8.linen._registry import register as register
