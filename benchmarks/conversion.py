"""Memory and speed of conversion: a synthetic bfloat16 checkpoint of many shards to int8 parameters.

    python benchmarks/conversion.py --gigabytes 4

Writes results/conversion.json. Each measurement is a process of its own. Memory is the peak of the anonymous pages
(device arrays are among these on a CPU; pages of mapped files aren't) above what the process had before the load.
Speed is compared with NumPy, which reads every tensor of the same files and casts it to float32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np

SHARD_BYTES = 200 * 10**6
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 2048, 5632, 16, 4, 32000
KV = HIDDEN // HEADS * KV_HEADS
MATRICES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def shapes(gigabytes: float) -> dict[str, tuple[int, ...]]:
    """Tensors of about so many bytes in bfloat16."""
    ends = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    ends["lm_head.weight"] = (VOCABULARY, HIDDEN)
    layer = {f"{name}.weight": shape for name, shape in MATRICES.items()}
    layer |= {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}
    size = lambda shapes: sum(2 * int(np.prod(shape)) for shape in shapes.values())
    layers = max(1, round((gigabytes * 1e9 - size(ends)) / size(layer)))
    return ends | {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}


def write_checkpoint(path: Path, gigabytes: float) -> None:
    from safetensors.numpy import save_file

    rng, shards, filled = np.random.default_rng(0), [[]], 0
    wanted = shapes(gigabytes)
    for name, shape in wanted.items():
        nbytes = 2 * int(np.prod(shape))
        if shards[-1] and filled + nbytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    noise = (rng.standard_normal(1 << 22, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    for i, names in enumerate(shards, 1):
        tensors = {name: np.resize(noise, wanted[name]) for name in names}
        save_file(tensors, path / f"model-{i:05d}-of-{len(shards):05d}.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": sum("input_layernorm" in name for name in wanted), "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))


class Peak:
    """The largest amount of anonymous memory inside the block, above what there was at its start."""

    def __enter__(self) -> Peak:
        self.start = self.peak = _anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.peak = max(self.peak, _anonymous_bytes())

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = max(self.peak, _anonymous_bytes()) - self.start


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("Expected RssAnon in /proc/self/status, got none")


def convert(path: Path) -> dict[str, float]:
    """What `jint8.load` takes, compilation included; and the memory of `jint8.save` after it."""
    import jax

    import jint8

    load = jint8.load  # imports flax
    jax.block_until_ready(jax.numpy.zeros(8))  # starts the backend
    _touch(path)
    with Peak() as peak:
        begin = time.perf_counter()
        model = load(path, dtype="bfloat16")
        jax.block_until_ready(model.params)
        seconds = time.perf_counter() - begin
    with tempfile.TemporaryDirectory(dir=path.parent) as directory, Peak() as saving:
        jint8.save(Path(directory) / "int8", model)
    return {
        "seconds": seconds,
        "peak_bytes": peak.bytes,
        "saving_bytes": saving.bytes,
        "result_bytes": jint8.memory_report(model.params).bytes,
    }


def _touch(path: Path) -> None:
    """Uses as much memory as the files have, and frees it.

    A virtual machine gets pages from its host at their first use, at less than 1 GB/s, and gives them back soon after
    they are freed: which measurement pays for that would be chance.
    """
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    pieces = [np.ones(1 << 25, np.uint8) for _ in range(size >> 25)]
    del pieces


def cast(path: Path) -> dict[str, float]:
    """Every tensor read and cast to float32, one after the other."""
    from jint8.checkpoints import open_checkpoint

    _touch(path)
    begin = time.perf_counter()
    with open_checkpoint(path) as checkpoint:
        for name in checkpoint.tensors:
            checkpoint.read(name).astype(np.float32)
    return {"seconds": time.perf_counter() - begin}


def measure(what: str, path: Path) -> dict[str, float]:
    """A process of its own, in which no other measurement has warmed or filled anything but the page cache."""
    command = [sys.executable, __file__, "--measure", what, "--at", str(path)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the checkpoint (1)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements, of which the median counts (3)")
    parser.add_argument("--at", type=Path, help="where the checkpoint is kept; default: a temporary directory")
    parser.add_argument("--measure", choices=("convert", "cast"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps({"convert": convert, "cast": cast}[args.measure](args.at)))
        return
    from harness import write

    with tempfile.TemporaryDirectory() as directory:
        path = args.at or Path(directory)
        if not (path / "config.json").exists():
            path.mkdir(parents=True, exist_ok=True)
            write_checkpoint(path, args.gigabytes)
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        runs = [(measure("cast", path), measure("convert", path)) for _ in range(args.repeats)]
        casts, converts = zip(*runs, strict=True)
        largest = 2 * max(int(np.prod(shape)) for shape in shapes(args.gigabytes).values())
    seconds = {
        name: float(np.median([run["seconds"] for run in of])) for name, of in (("cast", casts), ("convert", converts))
    }
    result_bytes = converts[0]["result_bytes"]
    peak = max(run["peak_bytes"] for run in converts)
    result = {
        "checkpoint_bytes": size,
        "int8_bytes": result_bytes,
        "largest_tensor_bytes": largest,
        "peak_bytes": peak,
        "more_while_saving_bytes": max(run["saving_bytes"] for run in converts),
        "peak_over_int8_and_largest": (peak - largest) / result_bytes,
        "numpy_bytes_per_s": size / seconds["cast"],
        "convert_bytes_per_s": size / seconds["convert"],
        "speed_over_numpy": seconds["cast"] / seconds["convert"],
    }
    for name, value in result.items():
        print(f"{name:28} {value:,.3f}")
    print(write("conversion", result))


if __name__ == "__main__":
    main()
