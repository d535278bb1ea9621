"""`jint8.export`: `jax.export` for programs in which the GPU kernels are, from a machine without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import export as jax_export
from jax.sharding import AbstractDevice, AbstractMesh

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export(
    fun: Callable[..., Any], *, platforms: Sequence[str] = ("cpu", "cuda"), gpu: str = "A100"
) -> Callable[..., jax_export.Exported]:
    """`jax.export.export`, with the Pallas kernels in programs for CUDA. Needs no GPU.

    One program serves all `platforms`: on CUDA it runs the kernels, elsewhere XLA. Weights are arguments of the program
    if they are arguments of `fun`.

    Args:
      fun: a function, or one that was jitted.
      platforms: of `"cpu"`, `"cuda"`, `"rocm"`, `"tpu"`.
      gpu: what the kernels' tiles are chosen for, by a name in `pallas_kernels.chips`: `"A100"`, `"RTX 4090"`,
        `"H100"`, `"H200"`, ... The program runs on other NVIDIA GPUs too if they have as much shared memory per block
        (an RTX 4090 has the least).

    Returns:
      A function of `fun`'s arguments (arrays or `jax.ShapeDtypeStruct`s) that returns a `jax.export.Exported`.

    Raises:
      ValueError: no platforms, an unknown one, or an unknown GPU.

    Examples:
      >>> import jax, jax.numpy as jnp, jint8
      >>> w = jint8.quantize(jnp.ones((64, 32)))
      >>> exported = jint8.export(jint8.matmul)(jax.ShapeDtypeStruct((4, 64), jnp.float32), w)
      >>> exported.platforms, exported.call(jnp.ones((4, 64)), w).shape
      (('cpu', 'cuda'), (4, 32))
    """
    if not platforms or isinstance(platforms, str) or not set(platforms) <= set(PLATFORMS):
        raise ValueError(f"Expected platforms to be some of {', '.join(PLATFORMS)}, got {platforms!r}.")
    device = _device(gpu)
    checks = [jax_export.DisabledSafetyCheck.custom_call(name) for name in ("__gpu$xla.gpu.triton", "mosaic_gpu_v2")]
    exporter = jax_export.export(jax.jit(fun), platforms=list(platforms), disabled_checks=checks)

    def exported(*args: Any, **kwargs: Any) -> jax_export.Exported:
        if "cuda" not in platforms:
            return exporter(*args, **kwargs)
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            return exporter(*args, **kwargs)

    return exported


def _device(gpu: str) -> AbstractDevice:
    """What JAX knows of a GPU that isn't here. Raises ValueError for one that isn't known."""
    from pallas_kernels import chips  # imports Pallas, which takes long

    known = chips.products()
    if gpu not in known:
        raise ValueError(f"Expected gpu to be one of {', '.join(known)}, got {gpu!r}.")
    return AbstractDevice(device_kind=known[gpu].device_kind, num_cores=known[gpu].cores, platform="gpu")
