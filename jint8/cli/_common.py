"""What the commands share: arguments, the cache, progress, output."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from jint8 import Config, LanguageModel

Progress = Callable[[int, int], None]

SOURCE = "a Hugging Face directory, a GGUF file, what `jint8 quantize` wrote, or a name on the hub (owner/model)"
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "merges.txt")


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """`--json` and `--quiet`."""
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print one JSON object on standard output, nothing else")
    group.add_argument("--quiet", action="store_true", help="no progress and no messages on standard error")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """How a model is loaded and computes."""
    group = parser.add_argument_group("model")
    group.add_argument("--scheme", metavar="NAME", help="how to quantize: llm.int8 (default), vector, none, ...")
    group.add_argument(
        "--preset", metavar="NAME", help="a choice that was measured: paper, static, rotated, best or fast"
    )
    group.add_argument("--outliers", metavar="WHO", help="who decides what is an outlier: batch, token or static")
    group.add_argument(
        "--calibrate",
        metavar="FILE",
        help="the text on which static outliers are found, or by which the preset rotated smooths (default: a short "
        "one of ours); none: smooth by the weights alone",
    )
    group.add_argument("--threshold", type=float, metavar="T", help="of outliers; default 6, 0 means no decomposition")
    group.add_argument("--dtype", metavar="NAME", help="of activations: float32, bfloat16 or float16")


def add_adapter_argument(parser: argparse.ArgumentParser) -> None:
    """`--adapter`."""
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter that PEFT saved, to add to the model")


def add_cache_argument(parser: argparse.ArgumentParser) -> None:
    """`--no-compile-cache`."""
    parser.add_argument(
        "--no-compile-cache",
        action="store_true",
        help="don't keep compiled programs in the cache ($JINT8_CACHE, default ~/.cache/jint8) for the next run",
    )


def cache_directory() -> Path:
    """`$JINT8_CACHE`, else `$XDG_CACHE_HOME/jint8`, else `~/.cache/jint8`."""
    if own := os.environ.get("JINT8_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "jint8")


def use_compile_cache(args: argparse.Namespace) -> None:
    """Have JAX keep compiled programs in the cache, unless `--no-compile-cache` says no or JAX has a place already."""
    import jax

    if args.no_compile_cache or getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        return
    directory = cache_directory() / "compiled"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        say(args, f"compiled programs are not kept: {error}")
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # JAX's default leaves programs out that compile in less than 1 s, but many of these add up.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def quant_config(args: argparse.Namespace) -> Config | None:
    """The Config that the arguments describe. None where none was given: the checkpoint's own then counts.

    Raises:
      ValueError: arguments that exclude each other, or out of their range.
    """
    from jint8 import Config

    options = ("scheme", "threshold", "outliers")
    given = {name: getattr(args, name) for name in options if getattr(args, name) is not None}
    if args.preset is not None and args.scheme is not None:
        raise ValueError("Expected --scheme or --preset, got both")
    config = Config() if args.preset is None else Config.preset(args.preset)
    config = dataclasses.replace(config, **given)
    if args.calibrate is not None and not config.is_calibrated:
        raise ValueError(
            "Expected --calibrate with what is calibrated (--preset rotated, static or best, --outliers static)"
        )
    return config if given or args.preset is not None else None


def float_dtype(name: str) -> np.dtype:
    """The dtype that `--dtype` names.

    Raises:
      ValueError: it isn't the name of a float type.
    """
    import jax.numpy as jnp

    with contextlib.suppress(TypeError):  # NumPy's, of a name that no dtype has
        dtype = jnp.dtype(name)
        if jnp.issubdtype(dtype, jnp.floating):
            return dtype
    raise ValueError(f"Expected --dtype to be a float type, such as float32 or bfloat16, got {name!r}")


def load(args: argparse.Namespace, path: str | os.PathLike[str], **options: Any) -> LanguageModel:
    """`jint8.load` with a progress bar, `--dtype`, and the text to calibrate on if one was given."""
    import jint8

    options["dtype"] = None if args.dtype is None else float_dtype(args.dtype)
    if args.calibrate is not None and options.get("quantize", True):
        options["calibrate"] = False if args.calibrate == "none" else read_text(args.calibrate)
    with progress_bar(args, "loading", unit="B", unit_scale=True) as progress:
        return jint8.load(path, adapter=getattr(args, "adapter", None), progress=progress, **options)


def find_source(args: argparse.Namespace, source: str) -> Path:
    """The path of `source`, downloaded where it is a name on the hub.

    Raises:
      FileNotFoundError: there is no such path, and it isn't a name on the hub that can be reached.
    """
    # What is there, or can't be a name on the hub, is taken as a path; `load` says what is wrong with it.
    path = Path(source)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or path.suffix == ".gguf":
        return path
    missing = f"Expected {SOURCE}, got {source!r}: no such path"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(f"{missing}, and hub names need huggingface_hub") from None
    say(args, f"looking for {source} on the hub")
    try:
        return Path(snapshot_download(source, allow_patterns=list(HUB_FILES)))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{missing}, and the hub says: {error}") from None


def read_text(file: str) -> str:
    """The content of a file.

    Raises:
      OSError: it can't be read.
      ValueError: it isn't UTF-8.
    """
    try:
        return Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: Expected a text in UTF-8, got: {error}") from None


def say(args: argparse.Namespace, text: str = "") -> None:
    """A message on standard error."""
    if not args.quiet:
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress_bar(args: argparse.Namespace, what: str, **options: Any) -> Iterator[Progress]:
    """A function of (done, total) that draws a bar on a terminal, and nothing elsewhere."""
    if args.quiet or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from tqdm import tqdm

    with tqdm(desc=what, leave=False, file=sys.stderr, **options) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


def report(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """The JSON object, where `--json` asks for it."""
    if args.json:
        print(json.dumps(result, ensure_ascii=False))


def megabytes(count: int) -> str:
    """`count` bytes for people."""
    return f"{count / 1e6:,.1f} MB"
