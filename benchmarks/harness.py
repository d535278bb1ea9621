"""Timing and results, shared by the benchmarks: alternating runs, medians, ratios within one run, JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jaxlib

RESULTS = Path(__file__).parent / "results"


def alternate(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, taken in turn so that a machine that slows down slows all of them.

    Each function is called once before, to compile; what it returns is waited for.
    """
    for run in runs.values():
        jax.block_until_ready(run())
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine() -> dict[str, Any]:
    """Versions and hardware."""
    model = platform.processor()
    flags: list[str] = []
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line.partition(":") for line in cpuinfo.read_text().splitlines()]
        info = {key.strip(): value.strip() for key, _, value in lines}
        model, flags = info.get("model name", model), info.get("flags", "").split()
    return {
        "python": sys.version.split()[0],
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "devices": [device.device_kind for device in jax.devices()],
        "cpu": model,
        "cpus": os.cpu_count(),
        "isa": [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8") if flag in flags],
    }


def write(name: str, result: dict[str, Any]) -> Path:
    """Writes `results/NAME.json` with the machine beside the result."""
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=2) + "\n")
    return path
