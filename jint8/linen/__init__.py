"""Flax linen: int8 weights under unchanged modules, and modules with int8 weights of their own."""

from jint8.linen import _handlers as _handlers
from jint8.linen._apply import apply as apply
from jint8.linen._registry import param as param
from jint8.linen._registry import register as register
