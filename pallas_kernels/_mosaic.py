"""Where the versions of JAX differ in Mosaic GPU."""

import inspect
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

# 0.10.2 has load(ref, idx, ...), transposes through a function and interprets nothing.
_INDEXED_LOAD = "idx" in inspect.signature(plgpu.load).parameters
CAN_INTERPRET = hasattr(plgpu, "InterpretGPUParams")


def load(ref, layout) -> jax.Array:
    """All of a reference to device memory, in registers."""
    loader: Any = plgpu.load
    args = (ref, ()) if _INDEXED_LOAD else (ref,)
    return loader(*args, layout=layout, optimized=False)


def transposed(ref):
    """A reference to shared memory with its two dimensions exchanged."""
    return plgpu.transpose_ref(ref, (1, 0)) if _INDEXED_LOAD else ref.T


def interpret_arguments(interpret: bool) -> dict[str, Any]:
    """What `plgpu.kernel` takes to be interpreted."""
    if not interpret:
        return {}
    if not CAN_INTERPRET:
        raise NotImplementedError(f"Expected JAX 0.11 or later to interpret a Mosaic kernel, got {jax.__version__}")
    params: Any = plgpu
    return {"interpret": params.InterpretGPUParams()}
