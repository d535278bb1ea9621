"""Stage "about": what this runs on, and what it can do: bf16 products alone, copies, and whether CUPTI works."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
from gpu import clock
from gpu.record import Record
from gpu.setting import Setting, text_of
from jax import lax

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "numpy", "torch", "bitsandbytes")
QUERY = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem"


def run(record: Record, setting: Setting) -> None:
    """Hardware and versions first, then host-timed ceilings, and CUPTI, which might hang, last."""
    device = jax.devices()[0]
    record.put(
        device=device.device_kind,
        chip=setting.chip.name,
        rehearsal=setting.rehearse,
        capability=getattr(device, "compute_capability", None),
        cores=getattr(device, "core_count", None),
        memory=(device.memory_stats() or {}).get("bytes_limit"),
        python=sys.version.split()[0],
        host_cpus=os.cpu_count(),
        versions=_versions(),
        nvidia_smi=_nvidia_smi(),
    )
    d, copied = (64, 1 << 12) if setting.rehearse else (8192, 1 << 30)
    a, b = (jax.random.normal(jax.random.key(i), (d, d), jnp.bfloat16) for i in range(2))
    product = jax.jit(bf16_product).lower(a, b).compile()
    times = clock.measure({"bf16": (product, (a, b), 1)}, "host")["bf16"]
    record.put(bf16={"size": d, "tflop_per_s": 2 * d**3 / times["us"] / 1e6, **times})
    data = jax.random.bits(jax.random.key(0), (copied,), jnp.uint8)
    copy = jax.jit(lambda x: x ^ jnp.uint8(1)).lower(data).compile()
    times = clock.measure({"copy": (copy, (data,), 1)}, "host")["copy"]
    record.put(copy={"bytes": copied, "tb_per_s": 2 * copied / times["us"] / 1e6, **times})
    if setting.rehearse:
        record.put(clock="host")
        return
    record.put(clock="host", cupti_error="it didn't come back")
    try:
        for _ in range(2):  # a second time, which finalize=False is for
            kernels = clock.kernel_times(product, (a, b))
    except Exception as error:
        record.put(cupti_error=text_of(error))
    else:
        del record.values["cupti_error"]
        record.put(clock="cupti", bf16_kernels=kernels)


def bf16_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """bfloat16 `x[m, k]` times `w[n, k]`, by XLA."""
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _nvidia_smi() -> str:
    """What the driver says of the GPU: reads only."""
    if shutil.which("nvidia-smi") is None:
        return "not installed"
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except subprocess.TimeoutExpired:
        return "no answer"
