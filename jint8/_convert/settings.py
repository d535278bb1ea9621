"""How to quantize: what the caller asks for, and what the checkpoint's `config.json` does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jint8._convert import bitsandbytes, compressed_tensors, four_bit_codes, int8_weights, quark, torchao
from jint8._convert.options import Options, shown
from jint8._core.config import Config
from jint8._trees.paths import Selection, matches
from jint8.checkpoints import Checkpoint

# Whose `quantization_config` is known. All but the first announce weights that are in int8 already.
_METHODS = {
    bitsandbytes.METHOD: bitsandbytes.options,
    compressed_tensors.METHOD: compressed_tensors.options,
    quark.METHOD: quark.options,
    torchao.METHOD: torchao.options,
}


def resolve_settings(
    checkpoint: Checkpoint, *, config: Config | None, quantize: bool, selection: Selection
) -> tuple[Config, Selection]:
    """How to quantize, and which weights: what the caller asks for, and the checkpoint's `quantization_config`.

    Args:
      checkpoint: to be quantized, or in int8 already.
      config: of the caller; None is that of the checkpoint, or else the default.
      quantize: False keeps every weight in floating point.
      selection: of the caller; what the checkpoint wants to be skipped is added.

    Raises:
      ValueError: the checkpoint is quantized in a way that isn't supported; or it is in int8, and the caller chooses
        weights, or a scheme that doesn't run on its values.
    """
    try:
        asked = _options(checkpoint.config)
        is_int8 = int8_weights.is_int8(checkpoint)
        if asked.method == bitsandbytes.METHOD:
            _check_four_bits(checkpoint)
        if is_int8 or asked.method not in (None, bitsandbytes.METHOD):
            _check_int8(checkpoint, asked, is_int8)
            if not quantize or selection != Selection():
                raise ValueError(
                    f"Expected a checkpoint in floating point, got int8 of {asked.method or bitsandbytes.METHOD}."
                )
            _check_scheme(config, asked)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{checkpoint.path}: {error}") from None
    if not quantize:
        config = Config(scheme="none")
    elif config is None:
        config = asked.config or Config()
    own = selection.skip
    skip = own if not asked.skip else lambda path: matches(path, own) or matches(path, asked.skip)
    return config, Selection(skip, selection.include)


def kept_in_float(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Patterns of the weights that a `config.json` wants to stay in floating point, whatever the caller asks for."""
    return _options(config).skip


def stored_by(config: Mapping[str, Any]) -> str | None:
    """The tool whose int8 weights a checkpoint has, by its `config.json`; None where that doesn't say they are int8."""
    asked = _asked(config)
    method = asked.get("quant_method") if isinstance(asked, dict) else None
    return method if method in _METHODS and method != bitsandbytes.METHOD else None


def _asked(config: Mapping[str, Any]) -> Any:
    """A `config.json`'s `quantization_config`, which the first versions of llm-compressor named otherwise."""
    asked = config.get("quantization_config")
    return config.get("compression_config") if asked is None else asked


def _options(config: Mapping[str, Any]) -> Options:
    """The `Options` in a `config.json`. Raises ValueError for another kind of quantization."""
    asked = _asked(config)
    if asked is None:
        return Options()
    if not isinstance(asked, dict):
        raise ValueError(f"Expected quantization_config to be an object, got {shown(asked)}.")
    method = asked.get("quant_method", bitsandbytes.METHOD)
    if not isinstance(method, str) or method not in _METHODS:
        raise ValueError(f"Expected a quantization_config of {', '.join(_METHODS)}, got {shown(method)}.")
    return _METHODS[method](asked)


def _check_four_bits(checkpoint: Checkpoint) -> None:
    """Raises ValueError where bitsandbytes' tensors and configuration don't agree on what is in four bits."""
    asked = bool(_asked(checkpoint.config).get("load_in_4bit"))
    packed = any(four_bit_codes.is_packed(checkpoint, name) for name in checkpoint.tensors)
    if asked and not packed:
        raise ValueError("Expected weights in nf4 or fp4, as the quantization_config of bitsandbytes says, got none.")
    if packed and not asked:
        raise ValueError("Expected a quantization_config of bitsandbytes in 4 bits, as weights are, got 8 bits.")


def _check_int8(checkpoint: Checkpoint, asked: Options, is_int8: bool) -> None:
    """Raises ValueError where tensors and configuration don't agree on what is stored."""
    names = checkpoint.tensors
    of_bitsandbytes = any(name.endswith(".SCB") for name in names)
    if asked.method is None and not of_bitsandbytes:
        raise ValueError("Expected a quantization_config that int8 weights with a weight_scale belong to, got none.")
    if not is_int8 or of_bitsandbytes != (asked.method in (None, bitsandbytes.METHOD)):
        got = (
            "those of bitsandbytes" if of_bitsandbytes else f"others, with {int8_weights.SCALE}" if is_int8 else "none"
        )
        raise ValueError(f"Expected int8 weights of {asked.method}, as the quantization_config says, got {got}.")
    for name in names:
        if not asked.static and name.rpartition(".")[2] in int8_weights.OF_ACTIVATIONS:
            raise ValueError(
                f"tensor {name!r}: Expected scales of activations only where the quantization_config says that they "
                "are static, got one."
            )


def _check_scheme(config: Config | None, asked: Options) -> None:
    """Raises ValueError unless the activations are quantized in a way that runs on int8 rows with a scale each."""
    if config is None:
        if asked.refused:
            raise ValueError(
                f"{asked.refused} jint8 runs such weights with one scale per token: to have it do so, give a config, "
                "such as jint8.Config() (--scheme llm.int8)."
            )
        return
    if config.rotate:
        raise ValueError(
            f"Expected a config without rotate for weights that are in int8 already, got rotate={config.rotate}."
        )
    scheme = config.table_row
    if scheme.affine or scheme.weights != "channel":
        raise ValueError(f"Expected a scheme that runs on int8 rows with a scale each, got {config.scheme!r}.")
