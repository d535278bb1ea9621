"""What the commands share: arguments, the cache, progress, output."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jint8.cli._compile_cache import cache_directory as cache_directory
from jint8.cli._compile_cache import use_compile_cache as use_compile_cache
from jint8.cli._hints import did_you_mean_path
from jint8.cli._saved_config import with_given as with_given
from jint8.cli._waiting import progress_bar as progress_bar
from jint8.cli._waiting import say as say

if TYPE_CHECKING:
    import numpy as np

    from jint8 import Config, LanguageModel

SOURCE = "a Hugging Face directory, a GGUF file, what `jint8 quantize` wrote, or a name on the hub (owner/model)"
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "merges.txt")


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """`--json` and `--quiet`."""
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print one JSON object on standard output, nothing else")
    group.add_argument("--quiet", action="store_true", help="no progress and no messages on standard error")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """How a model is loaded and computes."""
    from jint8._core.config import OUTLIER_MODES, PRESETS, SCHEMES

    group = parser.add_argument_group("model")
    group.add_argument(
        "--scheme",
        choices=list(SCHEMES),
        metavar="NAME",
        help=f"how to quantize: {', '.join(SCHEMES)} (llm.int8)",
    )
    group.add_argument(
        "--preset", choices=list(PRESETS), metavar="NAME", help=f"a choice that was measured: {', '.join(PRESETS)}"
    )
    group.add_argument(
        "--outliers",
        choices=OUTLIER_MODES,
        metavar="WHO",
        help=f"who decides what is an outlier: {', '.join(OUTLIER_MODES)} (batch)",
    )
    group.add_argument(
        "--calibrate",
        metavar="FILE",
        help="the text on which static outliers are found, by which a preset that rotates smooths, or w4-best rounds "
        "(default: a short one of ours; for w4-best, one that the model writes); none: smooth by the weights alone",
    )
    group.add_argument("--threshold", type=float, metavar="T", help="of outliers; 0 means no decomposition (6)")
    add_dtype_argument(group)


def add_dtype_argument(parser: argparse._ActionsContainer) -> None:
    """`--dtype`."""
    parser.add_argument("--dtype", metavar="NAME", help="of activations: float32, bfloat16 or float16")


def add_verify_argument(parser: argparse._ActionsContainer) -> None:
    """`--verify`."""
    parser.add_argument(
        "--verify", action="store_true", help="first compare all files with the SHA-256 sums that were saved with them"
    )


def add_adapter_argument(parser: argparse.ArgumentParser) -> None:
    """`--adapter`."""
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter that PEFT saved, to add to the model")


def add_batch_argument(parser: argparse._ActionsContainer, what: str, default: int | None = 1) -> None:
    """`--batch-size`: how many of `what` go through the model at once. None is all."""
    said = "all" if default is None else default
    parser.add_argument("--batch-size", type=int, default=default, metavar="N", help=f"{what} ({said})")


def add_cache_argument(parser: argparse.ArgumentParser) -> None:
    """`--no-compile-cache`."""
    parser.add_argument(
        "--no-compile-cache",
        action="store_true",
        help="don't keep compiled programs in the cache ($JINT8_CACHE, default ~/.cache/jint8) for the next run",
    )


def quant_config(args: argparse.Namespace) -> Config | None:
    """The Config that the arguments describe. None where none was given: the checkpoint's own then counts.

    Raises:
      OSError: as `check_loading`.
      ValueError: arguments that exclude each other, or out of their range; and as `check_loading`.
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
            "Expected --calibrate with what is calibrated (a preset that rotates or is static, --outliers static)"
        )
    check_loading(args)
    args.given = given if args.preset is None else None
    return config if given or args.preset is not None else None


def check_loading(args: argparse.Namespace) -> None:
    """Check and read, before anything is loaded, what arguments say of loading; `load` goes by it.

    Raises:
      OSError: a file that they name can't be read.
      ValueError: what they name isn't what it should be.
    """
    options: dict[str, Any] = {"dtype": None if args.dtype is None else float_dtype(args.dtype)}
    if getattr(args, "verify", False):
        options["verify"] = True
    if (adapter := getattr(args, "adapter", None)) is not None:
        if not Path(adapter, "adapter_config.json").is_file():
            raise FileNotFoundError(f"{adapter}: Expected a LoRA adapter that PEFT saved, got no adapter_config.json")
        options["adapter"] = adapter
    if getattr(args, "calibrate", None) is not None:
        options["calibrate"] = False if args.calibrate == "none" else read_text(args.calibrate)
    args.loading = options


def load(args: argparse.Namespace, path: str | os.PathLike[str], **options: Any) -> LanguageModel:
    """`jint8.load` as the arguments say, with a progress bar. They are checked: `quant_config` or `check_loading`."""
    import jint8

    options = {**args.loading, **options}
    if options.get("config") is not None and args.given is not None:
        options["config"] = with_given(args.given, path, options["config"])
    if not options.get("quantize", True):
        options.pop("calibrate", None)  # that of the other model of this run
    with progress_bar(args, "loading", f"reading {path}", unit="B", unit_scale=True) as progress:
        model = jint8.load(path, progress=progress, **options)
    say_stored(args, model.hf_config or {}, model.quant)
    return model


def say_stored(args: argparse.Namespace, hf_config: Mapping[str, Any], quant: Config) -> None:
    """Say that a checkpoint's int8 weights are another tool's, and by which scheme they are multiplied."""
    from jint8._convert.settings import stored_by

    if (tool := stored_by(hf_config)) is None:
        return
    outliers = f"outliers from {quant.threshold:g} on in 16 bits" if quant.decomposes else "no outliers split off"
    say(
        args, f"int8 weights as {tool} stored them; activations in int8, a scale per token, {outliers} ({quant.scheme})"
    )


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


def find_source(args: argparse.Namespace, source: str) -> Path:
    """The path of `source`, downloaded where it is a name on the hub.

    Raises:
      FileNotFoundError: there is no such path, and it isn't a name on the hub that can be reached.
    """
    # What is there, or can't be a name on the hub, is taken as a path; `load` says what is wrong with it.
    path = Path(source)
    hint = "" if path.exists() else did_you_mean_path(path)
    missing = f"Expected {SOURCE}, got {source!r}: no such path{hint}"
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or path.suffix == ".gguf":
        if hint:
            raise FileNotFoundError(missing)
        return path
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
    """The content of a file; of standard input for `-`.

    Raises:
      OSError: it can't be read.
      ValueError: it isn't UTF-8.
    """
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        return check_text(text, file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: Expected a text in UTF-8, got: {error}") from None


def check_text(text: str, name: str) -> str:
    """The text. Raises ValueError, with the name of where it is from, for bytes that aren't UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # Python has such bytes of arguments as lone surrogates
        raise ValueError(f"{name}: Expected a text in UTF-8, got: {error}") from None
    return text


def check_least(args: argparse.Namespace, **least: int) -> None:
    """Raises ValueError for an option below its smallest value; None is one that wasn't given."""
    for name, smallest in least.items():
        value = getattr(args, name)
        if value is not None and value < smallest:
            raise ValueError(f"Expected --{name.replace('_', '-')} to be at least {smallest}, got {value}")


def check_writable(file: str) -> None:
    """Raises OSError where no file of that name can be written."""
    path = Path(file)
    if path.is_dir():
        raise IsADirectoryError(f"{file}: Expected the name of a file to write, got a directory")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{file}: Expected a directory to write to, got no {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"{file}: Expected a file that can be written, got one that can't")


def check_float(source: str | os.PathLike[str], option: str, where: str = "") -> None:
    """Raises ValueError where the weights of a checkpoint are in int8 already, and an option needs them in float.

    The message says to give the original checkpoint, and `where`.
    """
    if (stored := stored_int8(source)) is not None:
        raise ValueError(
            f"{source}: Expected a checkpoint in floating point for {option}, got {stored}: give the one that it "
            f"was made from {where}".rstrip()
        )


def stored_int8(source: str | os.PathLike[str]) -> str | None:
    """What the int8 weights of a checkpoint are, for people; None where it is in floating point."""
    from jint8._convert.int8_weights import is_int8
    from jint8._convert.saved import saved_quantized
    from jint8.checkpoints import open_checkpoint
    from jint8.checkpoints._jint8 import Jint8Checkpoint

    with open_checkpoint(source) as checkpoint:
        if isinstance(checkpoint, Jint8Checkpoint):
            return "one that jint8 saved" if saved_quantized(checkpoint) else None
        return "int8" if is_int8(checkpoint) else None


def complete(args: argparse.Namespace) -> None:
    """The result is out: Ctrl-C from here on ends the command, but not as an interrupted one."""
    sys.stdout.flush()
    args.complete = True


def report(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """The JSON object, where `--json` asks for it."""
    if args.json:
        print(json.dumps(result, ensure_ascii=False))
        complete(args)


def megabytes(count: int) -> str:
    """`count` bytes for people."""
    return f"{count / 1e6:,.1f} MB"
