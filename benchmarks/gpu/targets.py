"""What the best published kernels reach, to set beside what is measured. None of it was measured by this repository."""

from __future__ import annotations

from typing import Any

K, N = 4096, 8192

# Tera-operations per second of an int8 product with scales, without outliers, of m rows by 4096 x 8192 weights.
PUBLISHED = (
    {"gpu": "H100", "m": 2048, "tera_per_s": 1321.0, "times_bf16": 1.85, "source": "sglang #3035"},
    {"gpu": "H100", "m": 1, "tera_per_s": 2.78, "source": "sglang #3035"},
    {"gpu": "A100", "m": 2048, "tera_per_s": 499.0, "times_bf16": 1.9, "source": "sglang #2752"},
    {"gpu": "A100", "m": 1, "tera_per_s": 1.60, "source": "sglang #2752"},
)
STEP_AT_17_ROWS = "no longer than 16 rows (vllm #56924 has a step in time there)"


def target(device: str, m: int, k: int, n: int) -> dict[str, Any]:
    """The published numbers for a product on a GPU, by its name; empty where there are none.

    An H200 has the multiprocessors of an H100: its targets for many rows are the same.
    """
    for entry in PUBLISHED:
        same = entry["gpu"] in device or (entry["gpu"] == "H100" and "H200" in device and m > 1)
        if same and (m, k, n) == (entry["m"], K, N):
            return entry
    return {}
