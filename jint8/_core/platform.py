"""What the program that is traced now will run on."""

from __future__ import annotations

import jax
from jax import lax


def on_one_cpu() -> bool:
    """Whether what is traced now runs on one CPU: of several devices, each may have a shard of an array only."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


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
