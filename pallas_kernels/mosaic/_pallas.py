"""Where the supported versions of JAX differ in Mosaic GPU, an unstable interface (`jax.experimental`).

Mosaic GPU is Pallas's way to Hopper's TMA copies and wgmma. Only `many_rows.py` uses it; what its versions name
differently is here. Checked on JAX 0.10.2, 0.11.2 and 0.12.0.1 by compiling, and on 0.12.0.1 by interpreting: 0.10.2
has no interpret mode, and that of 0.11.2 refuses kernels that end before every barrier was waited for.
"""

import inspect
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

# JAX 0.10.2 has load(ref, idx, ...) and transpose_ref. From 0.11 on these are deprecated or gone; load(ref, ...) and
# ref.T take their place.
_idx = inspect.signature(plgpu.load).parameters.get("idx")
_INDEXED_LOAD = _idx is not None and _idx.default is inspect.Parameter.empty

# From JAX 0.11 on, Mosaic kernels can be interpreted on a CPU.
CAN_INTERPRET = hasattr(plgpu, "InterpretGPUParams")


def load(ref, layout) -> jax.Array:
    """Loads all of a reference to device memory into registers, distributed over the threads as the layout says.

    `optimized=False` permits loads that don't coalesce: the layout follows wgmma's accumulators, not the memory.
    """
    loader: Any = plgpu.load  # its signature is another one from version to version
    args = (ref, ()) if _INDEXED_LOAD else (ref,)
    return loader(*args, layout=layout, optimized=False)


def transposed(ref):
    """A reference to shared memory with its two dimensions exchanged; nothing is moved."""
    return plgpu.transpose_ref(ref, (1, 0)) if _INDEXED_LOAD else ref.T


def interpret_arguments(interpret: bool) -> dict[str, Any]:
    """The keyword arguments that make `plgpu.kernel` interpret a kernel.

    Raises:
      NotImplementedError: this version of JAX can't.
    """
    if not interpret:
        return {}
    if not CAN_INTERPRET:
        raise NotImplementedError(f"Expected JAX 0.11 or later to interpret a Mosaic kernel, got {jax.__version__}")
    newer: Any = plgpu  # type checkers may see a JAX without the name
    return {"interpret": newer.InterpretGPUParams()}
