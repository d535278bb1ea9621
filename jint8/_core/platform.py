"""What the program that is traced now will run on."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator

import jax
from jax import lax

_lowered_for: contextvars.ContextVar[str | None] = contextvars.ContextVar("lowered_for", default=None)


@contextlib.contextmanager
def lowering_for(platform: str) -> Iterator[None]:
    """Within, what is traced is for that platform, whichever one JAX runs on.

    What is traced within must not be remembered by its arguments alone, as `jax.jit` does: another platform's program
    would get it.
    """
    token = _lowered_for.set(platform)
    try:
        yield
    finally:
        _lowered_for.reset(token)


def on_one_cpu() -> bool:
    """Whether what is traced now runs on one CPU: of several devices, each may have a shard of an array only."""
    return _lowered_for.get() in (None, "cpu") and jax.default_backend() == "cpu" and jax.device_count() == 1


def tpu_in_sight() -> bool:
    """Whether what is traced now may run on a TPU: it is the default backend, or `JINT8_TPU=1` in the environment.

    The latter is for programs that another machine compiles or exports for a TPU.
    """
    return jax.default_backend() == "tpu" or os.environ.get("JINT8_TPU") == "1"


def varying_as(value: jax.Array, *arrays: jax.Array) -> jax.Array:
    """`value`, marked as varying over the mesh axes that any of `arrays` varies over; for use in `jax.shard_map`.

    A loop's carry must have the type of its result: zeros that each device makes for itself don't vary, sums of what
    devices hold do. Reads `manual_axis_type`, which isn't a stable interface of JAX.
    """
    varying, *others = (jax.typeof(x).manual_axis_type.varying for x in (value, *arrays))
    axes = set().union(*others) - varying
    return lax.pcast(value, tuple(sorted(axes)), to="varying") if axes else value


def gpu_available() -> bool:
    """Whether what is traced now may run on a GPU: it is the default backend, or `jint8.export` names one."""
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() == "gpu" or (abstract is not None and abstract.platform == "gpu")
