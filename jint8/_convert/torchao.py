"""The `quantization_config` of torchao, as transformers 5 writes it beside safetensors: int8 with a scale per channel.

The tensors of a weight `MODULE.weight` are `MODULE._weight_qdata`, `_weight_scale` and `_weight_zero_point`, which
`jint8.checkpoints` calls by the names that compressed-tensors has for them. Older versions of transformers and torchao
wrote such weights as pickles alone, which are refused.
"""

from __future__ import annotations

from typing import Any

from jint8._convert.options import ANY, Known, Options, check_fields, shown
from jint8._core.config import Config

METHOD = "torchao"
_PER_ROW = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
_SYMMETRIC = {"_type": "MappingType", "_data": "SYMMETRIC"}

_FIELDS = {
    "quant_method": ANY,
    "quant_type": ANY,  # looked at by itself
    "modules_to_not_convert": ANY,  # such weights are stored in floating point
    "include_input_output_embeddings": ANY,
    "untie_embedding_weights": ANY,
}
_TYPE = {"_type": ANY, "_version": (2,), "_data": ANY}
# For each configuration with weights in int8, the fields of its `_data`. Those of activations are looked at below.
_WEIGHTS = {"granularity": (_PER_ROW, [_PER_ROW, _PER_ROW], None), "set_inductor_config": ANY}
_WEIGHT_ONLY, _DYNAMIC = "Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"
_KINDS: dict[str, Known] = {
    _WEIGHT_ONLY: _WEIGHTS | {"group_size": (None,)},
    _DYNAMIC: _WEIGHTS | {"act_mapping_type": ANY, "weight_only_decode": ANY, "reduce_range": ANY},
}
_ACTIVATIONS = {
    **dict.fromkeys(_WEIGHTS),
    "act_mapping_type": (_SYMMETRIC,),
    "weight_only_decode": (False,),
    "reduce_range": (False, None),  # seven bits
}


def options(asked: dict[str, Any]) -> Options:
    """The `Options` in a `quantization_config`.

    Raises:
      ValueError: weights of another kind, or something else that changes results; the message names the field.
    """
    check_fields("quantization_config", asked, _FIELDS)
    where = "quant_type.default"
    kinds = check_fields("quantization_config.quant_type", asked.get("quant_type"), {"default": ANY})
    kind = check_fields(where, kinds.get("default"), _TYPE, _version=None)
    name = kind.get("_type")
    if not isinstance(name, str) or name not in _KINDS:
        raise ValueError(f"Expected {where} to be {' or '.join(_KINDS)}, got {shown(name)}.")
    data = check_fields(f"{where}._data", kind.get("_data", {}), _KINDS[name])
    if name == _WEIGHT_ONLY:
        return Options(METHOD, refused=f"Expected {where} to be {_DYNAMIC}, got {name}.")
    try:
        check_fields(f"{where}._data", data, _ACTIVATIONS)
    except ValueError as error:
        return Options(METHOD, refused=str(error))
    return Options(METHOD, Config(scheme="vector"))
