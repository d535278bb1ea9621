"""The model in floating point that another one is compared with: of the same checkpoint, or of `--float PATH`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from jint8.cli import _common

if TYPE_CHECKING:
    from jint8 import LanguageModel


def add_float_argument(parser: argparse._ActionsContainer, more: str = "") -> None:
    """`--float`; `more` is said behind its help."""
    parser.add_argument(
        "--float",
        metavar="PATH",
        help=f"the checkpoint that SRC was made from, to compare with where SRC itself is in int8{more}",
    )


def find_float(args: argparse.Namespace, source: Path, option: str) -> Path:
    """The checkpoint to compare with: that of `--float`, or else `source`.

    Raises:
      FileNotFoundError: `--float` names nothing.
      ValueError: its weights are in int8; the message names the `option` that needs them in floating point.
    """
    if args.float is None:
        _common.check_float(source, option, "as --float PATH")
        return source
    path = _common.find_source(args, args.float)
    _common.check_float(path, "--float")
    return path


def load_float(args: argparse.Namespace, path: Path, model: LanguageModel) -> LanguageModel:
    """The checkpoint at `path` in floating point, with activations as those of `model`.

    Raises:
      ValueError: it isn't the model that `model` was made from, by the names and shapes of its parameters.
    """
    # `--verify` is for SRC, which was compared with its sums when it was loaded.
    reference = _common.load(args, path, quantize=False, verify=False, dtype=model.model.dtype)
    check_same(path, model, reference)
    return reference


def check_same(path: str | os.PathLike[str], model: LanguageModel, reference: LanguageModel) -> None:
    """Raises ValueError where two models differ in their sizes or in what was added to them, such as an adapter.

    Output heads aren't compared: a GGUF file may hold one of its own where the model that it was made from uses the
    embedding.
    """
    from jint8._core.qtensor import is_qtensor
    from jint8._trees.paths import leaf_paths

    shapes, expected = (
        {
            name: leaf.shape
            for name, leaf in leaf_paths(each.params, is_leaf=is_qtensor)
            if name.split("/")[0] != "lm_head"
        }
        for each in (reference, model)
    )
    for name in sorted(shapes.keys() | expected.keys()):
        if (got := shapes.get(name)) != (wanted := expected.get(name)):
            raise ValueError(
                f"{path}: Expected the model that SRC was made from, of which {name} is {wanted or 'not there'}, got "
                f"one where it is {got or 'not there'}"
            )
