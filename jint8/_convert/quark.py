"""The `quantization_config` of AMD's Quark: int8 weights with a scale per channel.

Values, scales and zero points of a weight are stored as compressed-tensors stores them (`_convert.int8_weights`), but
that scales have one axis, and that zero points are there also where all are 0.
"""

from __future__ import annotations

from typing import Any

from jint8._convert.options import ANY, Known, Options, check_fields, shown
from jint8._core.config import Config

METHOD = "quark"
# What these change is in the weights that are stored. Rotations and low-rank parts ("rotation", "svdquant") go on while
# the model runs.
_ALGORITHMS = ("smooth", "autosmoothquant", "awq", "gptq", "gptaq", "autoround", "qronos")

_FIELDS: Known = {
    "quant_method": ANY,
    "global_quant_config": ANY,  # looked at by itself, as are the next two
    "algo_config": ANY,
    "export": ANY,
    "exclude": ANY,  # such weights are stored in floating point
    "layer_quant_config": (None, {}),
    "layer_type_quant_config": (None, {}),
    "kv_cache_quant_config": (None, {}),
    "kv_cache_post_rope": (None, False),
    "softmax_quant_spec": (None,),
    "quant_mode": ANY,
    "version": ANY,
}
_EXPORT: Known = {
    "kv_cache_group": (None, []),
    "weight_format": ("real_quantized",),
    "custom_mode": ("quark",),
    "pack_method": ANY,  # the order of values of less than 8 bits
    "min_kv_scale": ANY,
    "weight_merge_groups": ANY,
}
_LAYER: Known = {
    "weight": ANY,
    "input_tensors": ANY,
    "output_tensors": (None,),
    "bias": (None,),
    "target_device": ANY,
}
_TENSOR = {
    "dtype": ("int8",),
    "qscheme": ("per_channel",),
    "symmetric": (True,),
    "group_size": (None,),
    "block_size": (None,),
    "is_scale_quant": (None, False),
    "mx_element_dtype": (None,),
    "scale_format": (None,),
    "scale_calculation_mode": (None,),
    "qat_spec": (None,),
    "zero_point_type": ANY,
    "enable_buffer_reuse": ANY,
    "max_input_numel": ANY,
}
# How the scales of weights were found and rounded doesn't matter here.
_WEIGHT = _TENSOR | {
    "ch_axis": (0,),
    "is_dynamic": (False,),
    "scale_type": ANY,
    "round_method": ANY,
    "observer_cls": ANY,
}
# Quark's activations are [batch, position, feature]: a scale for each entry of axis 1 is one per token.
_ACTIVATIONS = _TENSOR | {
    "ch_axis": (1,),
    "is_dynamic": (True,),
    "scale_type": ("float",),
    "round_method": ("half_even",),
    "observer_cls": ("PerChannelMinMaxObserver",),
}
_MISSING = {"dtype": None, "qscheme": None, "symmetric": None, "ch_axis": None, "is_dynamic": None}


def options(asked: dict[str, Any]) -> Options:
    """The `Options` in a `quantization_config`.

    Raises:
      ValueError: weights of another kind, or something else that changes results; the message names the field.
    """
    check_fields("quantization_config", asked, _FIELDS)
    check_fields("quantization_config.export", asked.get("export"), _EXPORT, weight_format=None)
    _check_algorithms(asked.get("algo_config"))
    layer = check_fields("global_quant_config", asked.get("global_quant_config"), _LAYER)
    check_fields("global_quant_config.weight", layer.get("weight"), _WEIGHT, **_MISSING)
    activations = layer.get("input_tensors")
    try:
        check_fields("global_quant_config.input_tensors", activations, _ACTIVATIONS, **_MISSING)
    except ValueError as error:
        static = isinstance(activations, dict) and not activations.get("is_dynamic")
        return Options(METHOD, refused=str(error), static=static)
    return Options(METHOD, Config(scheme="vector"))


def _check_algorithms(found: Any) -> None:
    """Raises ValueError for an algorithm that isn't known to be in the weights alone."""
    for algorithm in found if isinstance(found, list) else [] if found is None else [found]:
        name = algorithm.get("name") if isinstance(algorithm, dict) else algorithm
        if name not in _ALGORITHMS:
            raise ValueError(
                f"Expected quantization_config.algo_config to name algorithms among {', '.join(_ALGORITHMS)}, got "
                f"{shown(name)}."
            )
