"""Stage "peers": PyTorch's 16-bit layer and bitsandbytes' LLM.int8() layer, where they are installed."""

from __future__ import annotations

import importlib
import statistics
from typing import Any

from gpu.record import Record

# (m, k, n): the most valuable first.
PRODUCTS = (
    (2048, 4096, 16384),
    (1, 4096, 14336),
    (16, 4096, 14336),
    (2048, 2048, 8192),
    (1, 14336, 4096),
    (2048, 4096, 8192),
    (17, 4096, 8192),
)
SETS = 4  # of weights, in turn: together they don't fit in the L2 cache
CALLS, ROUNDS = 20, 5


def run(record: Record, rehearse: bool) -> None:
    """Microseconds of each by CUDA events; a line that says so where a package is missing."""
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        record.put(skipped=f"PyTorch can't be imported: {error}")
        return
    if rehearse or not torch.cuda.is_available():
        record.put(skipped="a rehearsal uses no GPU" if rehearse else "PyTorch sees no GPU")
        return
    record.put(versions={"torch": torch.__version__})
    try:
        bnb: Any = importlib.import_module("bitsandbytes")
        record.put(versions={**record.values["versions"], "bitsandbytes": bnb.__version__})
    except Exception as error:  # it may be there and find no CUDA library
        bnb = None
        record.put(bitsandbytes=f"not measured: {type(error).__name__}: {error}"[:300])
    for m, k, n in PRODUCTS:
        count = SETS if m <= 64 else 1
        layers = [torch.nn.Linear(k, n, bias=False, dtype=torch.float16, device="cuda") for _ in range(count)]
        x = torch.randn(m, k, dtype=torch.float16, device="cuda").clamp(-5.5, 5.5)
        x[:, :: k // 6] *= 30
        row: dict[str, Any] = {"m": m, "k": k, "n": n, "sets": count, "torch 16-bit": _us(torch, layers, x)}
        for threshold in (6.0, 0.0) if bnb else ():
            int8 = []
            for layer in layers:
                made = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=threshold)
                made.load_state_dict(layer.state_dict())
                int8.append(made.cuda())
            row[f"bitsandbytes threshold={threshold:g}"] = _us(torch, int8, x)
        record.add("table", row)


def _us(torch: Any, layers: list[Any], x: Any) -> float:
    """Microseconds of a layer: the median of some rounds, in each of which all layers take turns."""
    times = []
    with torch.no_grad():
        for number in range(ROUNDS + 1):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(CALLS):
                for layer in layers:
                    layer(x)
            end.record()
            torch.cuda.synchronize()
            if number:  # the first one warms up
                times.append(start.elapsed_time(end) * 1e3 / (CALLS * len(layers)))
    return statistics.median(times)
