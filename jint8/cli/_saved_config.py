"""What `--scheme`, `--threshold` and `--outliers` mean for a model that jint8 saved: they change its own config."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jint8 import Config


def with_given(given: Mapping[str, Any], path: str | os.PathLike[str], config: Config) -> Config:
    """`config`; for a model that jint8 saved, its own one with what was `given` changed.

    A preset is a whole config and isn't merged with anything.

    Raises:
      OSError: the model's `jint8.json` can't be read.
      ValueError: it is damaged, or what was given doesn't go with the rest of its config, or has no effect there.
    """
    from jint8._convert.saved import saved_config
    from jint8.checkpoints._jint8 import METADATA, Jint8Checkpoint

    if not Path(path, METADATA).is_file():
        return config
    with Jint8Checkpoint(Path(path)) as checkpoint:
        own = saved_config(checkpoint, None)
    try:
        merged = dataclasses.replace(own, **given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if "scheme" not in given and not own.table_row.decomposition:
        option = next(iter(given))
        raise ValueError(
            f"{path}: Expected no --{option} for a model that was saved with the scheme {own.scheme!r}, which splits "
            f"no outliers off, got {given[option]}"
        )
    return merged
