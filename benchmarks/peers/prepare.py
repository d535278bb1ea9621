"""The same weights for every engine: SmolLM2-135M out of the file that `jint8 demo` fetches.

    jint8 demo && python benchmarks/peers/prepare.py WEIGHTS --python llama_cpp=PYTHON --python ctranslate2=PYTHON ...

Writes to the directory WEIGHTS: `source.gguf` (a link to the file), `huggingface` (dequantized to float32 by jint8's
reader), and what each engine makes of them in its own Python: `q8_0.gguf`, `ctranslate2`, `dynamic_int8.onnx`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rows import ENGINES

from jint8.checkpoints import open_checkpoint
from jint8.checkpoints._destination import Destination
from jint8.checkpoints._huggingface import write_huggingface
from jint8.cli._common import cache_directory
from jint8.cli._demo import FILE

Arrays = dict[str, np.ndarray]
WORKER = Path(__file__).with_name("worker.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="directory to make")
    add_python_argument(parser)
    args = parser.parse_args()
    args.weights.mkdir(parents=True, exist_ok=True)
    source = args.weights / "source.gguf"
    if not source.exists():
        source.symlink_to((cache_directory() / FILE).resolve(strict=True))
    if not (args.weights / "huggingface").exists():
        dequantize(source, args.weights / "huggingface")
    for engine in ENGINES:
        python = dict(args.python).get(engine, sys.executable)
        done = subprocess.run(
            [python, WORKER, engine, args.weights, "--prepare"], stdout=subprocess.PIPE, text=True, check=True
        )
        answer = json.loads(done.stdout)
        print(f"{engine}: {'skipped, ' + answer['missing'] if 'missing' in answer else 'ready'}", flush=True)


def dequantize(source: Path, target: Path, change: Callable[[Arrays], Arrays] = lambda arrays: arrays) -> None:
    """A Hugging Face directory in float32 of a Llama's checkpoint, and of what `change` makes of its arrays."""
    with open_checkpoint(source) as checkpoint:
        arrays = change({name: np.asarray(checkpoint.read(name), np.float32) for name in checkpoint.tensors})
        config = {**checkpoint.config, "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
        with Destination(target) as destination:
            write_huggingface(destination, arrays, config=config, tokenizer=checkpoint.tokenizer(), shard_bytes=2**40)


def add_python_argument(parser: argparse.ArgumentParser) -> None:
    """`--python ENGINE=PATH`, as pairs."""

    def pair(text: str) -> tuple[str, str]:
        engine, _, path = text.partition("=")
        if engine not in ENGINES or not path:
            raise argparse.ArgumentTypeError(f"Expected ENGINE=PATH with one of {', '.join(ENGINES)}, got {text!r}")
        return engine, path

    parser.add_argument(
        "--python",
        type=pair,
        action="append",
        default=[],
        metavar="ENGINE=PATH",
        help=f"interpreter that has an engine's packages; default: this one. Engines: {', '.join(ENGINES)}",
    )


if __name__ == "__main__":
    main()
