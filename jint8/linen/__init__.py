"""Flax linen: int8 weights under unchanged modules, and modules with int8 weights of their own."""

from jint8._trees import flax_state as _flax_state  # noqa: F401 (tells flax.serialization of QTensor)
from jint8.linen import _handlers as _handlers
from jint8.linen._apply import apply as apply
from jint8.linen._block import Int8TransformerBlock as Int8TransformerBlock
from jint8.linen._modules import Int8Dense as Int8Dense
from jint8.linen._modules import Int8DenseGeneral as Int8DenseGeneral
from jint8.linen._registry import param as param
from jint8.linen._registry import register as register
