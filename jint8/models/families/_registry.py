"""Finds the families: from a `model_type` to its `Family`, and from parameters to the tensors that make them up."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from jint8.models._config import ModelConfig
from jint8.models._fused import row_order
from jint8.models.families._family import COLUMNS, HEADS, Family
from jint8.models.families._layout import Source


def _find_families() -> dict[str, Family]:
    """The `FAMILIES` of every module in this package that has such a table, by `model_type`."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        families = getattr(importlib.import_module(f"{__package__}.{module.name}"), "FAMILIES", {})
        if twice := found.keys() & families.keys():
            raise ValueError(f"Expected each model_type in one file, got {', '.join(twice)} again in {module.name}")
        found |= families
    return dict(sorted(found.items()))


_ALL = _find_families()
FAMILIES: Mapping[str, Family] = {name: family for name, family in _ALL.items() if not family.encoder}
ENCODERS: Mapping[str, Family] = {name: family for name, family in _ALL.items() if family.encoder}
HEAD = "lm_head"


def model_config(config: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a Hugging Face configuration.

    Args:
      config: the content of `config.json`.

    Returns:
      What `jint8.models.Decoder` takes.

    Raises:
      ValueError: an architecture or option that isn't supported, or a missing or impossible size.

    Examples:
      >>> from jint8.models import model_config
      >>> model_config({"model_type": "llama", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 16,
      ...               "num_hidden_layers": 1, "num_attention_heads": 2}).head_dim
      4
    """
    config = text_config(config)
    if (name := config.get("model_type")) in [*ENCODERS]:  # a list, as `name` may be anything
        raise ValueError(f"Expected a decoder, got {name!r}: jint8.load_encoder loads encoders.")
    return _config(config, FAMILIES)


def encoder_config(config: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` of an encoder's Hugging Face configuration.

    Args:
      config: the content of `config.json`.

    Returns:
      What `jint8.models.Encoder` takes.

    Raises:
      ValueError: an architecture or option that isn't supported, or a missing or impossible size.

    Examples:
      >>> from jint8.models import encoder_config
      >>> encoder_config({"model_type": "bert", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 16,
      ...                 "num_hidden_layers": 1, "num_attention_heads": 2}).causal
      False
    """
    return _config(config, ENCODERS)


def _config(config: Mapping[str, Any], families: Mapping[str, Family]) -> ModelConfig:
    name = config.get("model_type")
    if not isinstance(name, str) or name not in families:
        raise ValueError(f"Expected a model_type among {', '.join(families)}, got {name!r}.")
    try:
        with np.errstate(divide="raise", over="raise", invalid="raise"):
            return families[name].config(config)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"Expected a configuration of {name}, got an impossible value in it: {error!r}.") from error


def family(config: ModelConfig) -> Family:
    """The family of a model."""
    return _ALL[config.family]


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the language model alone, where `config.json` is that of a multimodal model (Gemma 3)."""
    if config.get("model_type") == "gemma3":
        text = config.get("text_config") or {}
        if not isinstance(text, Mapping):
            raise ValueError(f"Expected text_config to be an object, got {text!r}.")
        return {**text, "model_type": "gemma3_text"}
    return dict(config)


def sources(config: ModelConfig, paths: Iterable[str], tensors: Collection[str]) -> dict[str, Source]:
    """Which tensors make up which parameter.

    Args:
      config: of the model.
      paths: of its parameters, such as `"layers_0/attention/qkv/weight"`.
      tensors: the names in the checkpoint, which decide among the family's prefixes.

    Returns:
      For each path, its `Source`. Its tensors needn't be in the checkpoint.
    """
    own = family(config)
    embedding = f"{own.modules['embedding']}.weight"
    prefix = next((p for p in own.prefixes if p + embedding in tensors), own.prefixes[0])
    found = {}
    for path in paths:
        module, _, leaf = path.rpartition("/")
        if not module:  # a table, such as "embedding", is a parameter of the model itself
            module, leaf = leaf, "weight"
        leaf = "weight" if leaf == "scale" else leaf  # PyTorch's name for the gain of a norm
        layer = re.match(r"layers_(\d+)/", module)
        module = re.sub(r"^layers_\d+/", "layers/", module)
        theirs = own.modules[module]
        theirs = (theirs,) if isinstance(theirs, str) else theirs
        experts = range(config.experts) if "{e}" in theirs[0] else range(1)
        start = "" if module == HEAD else prefix
        names = tuple(f"{start}{name.format(i=layer and layer[1], e=e)}.{leaf}" for e in experts for name in theirs)
        # HEADS is the decoder's own order of rows (see `_fused.py`), so that these aren't reordered.
        layout = own.layouts.get(module)
        transposed = layout == COLUMNS and leaf == "weight"
        found[path] = Source(names, transposed, None if layout == HEADS else row_order(module, config))
    return found


def ignored(name: str, config: ModelConfig) -> bool:
    """Whether a tensor of a checkpoint may be left unread: a buffer, or an output head tied to the embedding."""
    own = family(config)
    tied = config.tie_embeddings and name == f"{own.modules[HEAD]}.weight"
    return tied or any(fnmatchcase(name, pattern) for pattern in own.unused)
