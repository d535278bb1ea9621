"""The `quantization_config` of compressed-tensors, which llm-compressor writes: W8A8 in int8.

A group of layers has arguments for its weights and for the activations that they are multiplied by. Weights have to be
symmetric int8 with a scale per output channel, as `_convert.int8_weights` reads them. Which layers are in which group,
and which in none (`targets`, `ignore`), needn't be known: a weight in int8 has a `weight_scale` beside it, and all
groups have to be of this one kind.
"""

from __future__ import annotations

from typing import Any

from jint8._convert.options import ANY, Known, Options, check_fields
from jint8._core.config import Config

METHOD = "compressed-tensors"
# Both store int8 values as they are. The others pack them, or are for floats.
_FORMATS = ("int-quantized", "naive-quantized")

_FIELDS: Known = {
    "quant_method": ANY,
    "format": _FORMATS,
    "quantization_status": ("compressed", "frozen"),  # the second of early versions, which stored the same
    "config_groups": ANY,  # looked at one by one
    "ignore": ANY,
    "kv_cache_scheme": (None,),
    "sparsity_config": ANY,
    "transform_config": (None, {}),  # rotations, which may be of activations
    "global_compression_ratio": ANY,
    "version": ANY,
}
# Zeros among the weights, stored as any other value.
_DENSE: Known = {
    "format": ("dense",),
    "global_sparsity": ANY,
    "sparsity_structure": ANY,
    "registry_requires_subclass": ANY,
    "targets": ANY,
    "ignore": ANY,
}
_GROUP_FIELDS: Known = {
    "targets": ANY,
    "weights": ANY,
    "input_activations": ANY,
    "output_activations": (None,),
    "format": (None, *_FORMATS),
}
# How scales were found, and in which dtype they are stored, doesn't matter here.
_ARGUMENTS = {
    "num_bits": (8,),
    "type": ("int",),
    "symmetric": (True,),
    "group_size": (None, -1),
    "block_structure": (None,),
    "actorder": ANY,
    "observer": ANY,
    "observer_kwargs": ANY,
    "scale_dtype": ANY,
    "zp_dtype": ANY,
}
_WEIGHTS = _ARGUMENTS | {"strategy": ("channel",), "dynamic": (False,)}
_ACTIVATIONS = _ARGUMENTS | {"strategy": ("token",), "dynamic": (True,)}


def options(asked: dict[str, Any]) -> Options:
    """The `Options` in a `quantization_config`.

    Raises:
      ValueError: weights of another kind, or something else that changes results; the message names the field.
    """
    check_fields("quantization_config", asked, _FIELDS, format="fakequant")
    if (sparsity := asked.get("sparsity_config")) not in (None, {}):
        check_fields("quantization_config.sparsity_config", sparsity, _DENSE, format=None)
    groups = asked.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ValueError("Expected quantization_config.config_groups to be an object with a group, got none.")
    refused, static = "", False
    for name, group in groups.items():
        where = f"config_groups.{name}"
        check_fields(where, group, _GROUP_FIELDS)
        check_fields(f"{where}.weights", group.get("weights"), _WEIGHTS, strategy=None)
        activations = group.get("input_activations")
        try:
            check_fields(f"{where}.input_activations", activations, _ACTIVATIONS, strategy=None, dynamic=False)
        except ValueError as error:
            refused = refused or str(error)
            static = static or (isinstance(activations, dict) and not activations.get("dynamic"))
    return Options(METHOD, None if refused else Config(scheme="vector"), refused=refused, static=static)
