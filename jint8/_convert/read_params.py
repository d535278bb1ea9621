"""From the tensors of a checkpoint to the parameters of a decoder, one tensor at a time in floating point."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import Mesh

from jint8._convert.assemble import decoder_shardings
from jint8._convert.read_parameter import Reader
from jint8._convert.targets import abstract_leaves, find_targets
from jint8._core.config import Config
from jint8._core.outlier_rows import check_calibrated
from jint8._trees.paths import Selection, nested
from jint8.checkpoints import Checkpoint
from jint8.models import Decoder, Encoder

Progress = Callable[[int, int], None]

WORKERS = 4  # parameters that are read at a time


def read_params(
    checkpoint: Checkpoint,
    model: Decoder | Encoder,
    *,
    config: Config,
    selection: Selection,
    outliers: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The parameters of `model` out of `checkpoint`; see `jint8.load`.

    With a mesh, each is divided among its devices, and of its rows only those are read that devices of this process
    hold (all, where they hold some columns of each).
    """
    check_calibrated(outliers)
    targets = find_targets(checkpoint, model, config=config, selection=selection)
    if unknown := sorted(set(outliers or ()) - set(targets)):
        raise ValueError(f"Expected the outliers' paths to be parameters, got {', '.join(unknown)}.")
    placed = {} if mesh is None else decoder_shardings(abstract_leaves(targets, config), mesh)
    total = sum(checkpoint.tensors[name].nbytes for target in targets.values() for name in target.source.tensors)
    done, lock = 0, threading.Lock()

    def tell(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            if progress is not None:
                progress(done, total)

    device = jax.config.jax_default_device  # type: ignore[attr-defined]  # of this thread

    def read(path: str) -> Any:
        source, expected, axes = targets[path]
        with jax.default_device(device):
            reader = Reader(checkpoint, source, config, model, tell)
            return reader.read(
                path,
                expected.shape,
                quantized=axes is not None,
                outliers=(outliers or {}).get(path),
                sharding=placed.get(path),
            )

    with ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1)) as workers:
        try:
            return nested(dict(zip(targets, workers.map(read, targets), strict=True)))
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            raise
