"""From the tensors of a checkpoint to all parameters of a model, with a few tensors at a time in floating point."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import Mesh

from jint8._convert.assemble import decoder_shardings
from jint8._convert.read_parameter import ParameterReader
from jint8._convert.targets import Target, abstract_leaves, find_targets, say_what_differs
from jint8._core.calibration import calibrated_paths, check_calibrated, of_weight
from jint8._core.config import Config
from jint8._core.qtensor import QTensor
from jint8._trees.paths import Selection, nested
from jint8.checkpoints import Checkpoint
from jint8.models import Decoder, Encoder

Progress = Callable[[int, int], None]  # called with the bytes read so far, and those of all tensors

WORKERS = 4  # threads, each of which has one tensor in floating point


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
    """The parameters of a model, read from a checkpoint that `jint8.save` didn't write.

    With a mesh, parameters are sharded over its devices, and a process reads only rows of which its own devices hold
    something: where columns are sharded, that is all rows.

    Args:
      checkpoint: in floating point, or in int8 of another tool (`int8_weights.py`).
      model: that the checkpoint is for.
      config: how to quantize.
      selection: which weights.
      outliers: calibrated outlier columns by path.
      mesh: the devices that the parameters are sharded over; None is one device.
      progress: called as tensors are done with, from several threads but one at a time.

    Returns:
      The tree of parameters, weights in int8 as `QTensor`s.

    Raises:
      TypeError: `outliers` isn't a mapping.
      ValueError: tensors that aren't those of `model`, values or outliers that can't be used, or a weight that the mesh
        can't shard evenly; the message names file and tensor, or the path.
    """
    targets = find_targets(checkpoint, model, config=config, selection=selection)
    say_what_differs(checkpoint, targets, config)
    return read_targets(checkpoint, model, targets, config=config, outliers=outliers, mesh=mesh, progress=progress)


def read_targets(
    checkpoint: Checkpoint,
    model: Decoder | Encoder,
    targets: Mapping[str, Target],
    *,
    config: Config,
    outliers: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The tree of some parameters of a model: as `read_params`, of the targets that `find_targets` found or a part."""
    check_calibrated(outliers)
    check_mesh(checkpoint, config, mesh)
    if unknown := sorted(calibrated_paths(outliers) - set(targets)):
        raise ValueError(f"Expected the outliers' paths to be parameters, got {', '.join(unknown)}.")
    shardings = {} if mesh is None else decoder_shardings(abstract_leaves(targets, config, mesh), mesh)
    total = sum(checkpoint.tensors[name].nbytes for target in targets.values() for name in target.source.tensors)
    done, lock = 0, threading.Lock()

    def count(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            if progress is not None:
                progress(done, total)

    # `jax.default_device` holds for the thread that calls it: the workers get the caller's.
    device = jax.config.jax_default_device  # type: ignore[attr-defined]

    def read_one(path: str) -> jax.Array | QTensor:
        with jax.default_device(device):
            reader = ParameterReader(checkpoint, path, targets[path], config, model.dtype, count)
            return reader.read(**of_weight(outliers, path, config), sharding=shardings.get(path))

    with ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1)) as workers:
        try:
            return nested(dict(zip(targets, workers.map(read_one, targets), strict=True)))
        except BaseException:  # also Ctrl-C: leaving the block would first read all that is in the queue
            workers.shutdown(wait=False, cancel_futures=True)
            raise


def check_mesh(checkpoint: Checkpoint, config: Config, mesh: Mesh | None) -> None:
    """Raises ValueError where weights of four bits would be made on several devices."""
    if config.four_bits and mesh is not None:
        raise ValueError(
            f"{checkpoint.path}: Expected a scheme of int8 with a mesh, got {config.scheme!r}: load without a mesh, "
            "save, and load what was saved with it."
        )
