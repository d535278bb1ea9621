"""Convert a model to int8 and save it.

DST appears complete or not at all (docs/reliability.md has the exceptions), and what can't be written is said before
anything is read. JSON: files (how many were written), bytes_in (of the files with the tensors),
bytes_out (of all files written; with --dry-run, of the weights), quantized and skipped (numbers of parameters).
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

from jint8.cli import _common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("source", metavar="SRC", help=_common.SOURCE)
    parser.add_argument("destination", metavar="DST", help="a directory that isn't there yet")
    parser.add_argument(
        "--skip",
        default=[],
        metavar="PATTERN",
        action="append",
        help="weights to keep in floating point, besides the output head: 'mlp/down', 'layers_0', 'q_proj', ...; may "
        "be repeated",
    )
    parser.add_argument(
        "--include",
        default=[],
        metavar="PATTERN",
        action="append",
        help="weights to quantize after all: 'embedding', 'lm_head', ...; may be repeated",
    )
    parser.add_argument(
        "--format",
        choices=("jint8", "bitsandbytes"),
        default="jint8",
        help="bitsandbytes: as PyTorch's transformers saves a model that it loaded with load_in_8bit",
    )
    parser.add_argument("--dry-run", action="store_true", help="only print what would become of which weights")
    _common.add_model_arguments(parser)
    _common.add_output_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from jint8 import memory_report
    from jint8._inference.save import write_model
    from jint8.checkpoints._destination import Destination, check_destination

    options: dict[str, Any] = {"config": _common.quant_config(args), "skip": args.skip, "include": args.include}
    destination = Path(args.destination)
    with contextlib.ExitStack() as stack:
        # First of all, since what can't be written should not be downloaded or read either.
        if args.dry_run:
            check_destination(destination)
        else:
            place = stack.enter_context(Destination(destination, lambda text: _common.say(args, text)))
        source = _common.find_source(args, args.source)
        bytes_in, planned = _plan(args, source, **options)
        plan = memory_report(planned)
        result = {"files": 0, "bytes_in": bytes_in, "bytes_out": plan.bytes, **_counts(planned)}
        if not args.dry_run:
            place.check_space(plan.bytes)
            write_model(place, _common.load(args, source, **options), format=args.format)
            _common.complete(args)
            sizes = [file.stat().st_size for file in destination.iterdir()]
            result |= {"files": len(sizes), "bytes_out": sum(sizes)}
    if args.json:
        _common.report(args, result)
        return
    print(plan)
    print(f"{result['quantized']} weights in int8, {result['skipped']} parameters in floating point")
    if not args.dry_run:
        read, written = _common.megabytes(bytes_in), _common.megabytes(result["bytes_out"])
        print(f"{read} read, {written} written to {destination} in {result['files']} files")


def _plan(args: argparse.Namespace, source: Path, **options: Any) -> tuple[int, dict[str, Any]]:
    """The bytes of the files with the tensors, and what becomes of each parameter, without values."""
    from jint8._convert.settings import resolve_settings
    from jint8._convert.targets import abstract_leaves, find_targets, say_what_differs
    from jint8._inference.load import build_decoder, default_dtype
    from jint8._trees.paths import Selection
    from jint8.checkpoints import open_checkpoint

    with open_checkpoint(source) as checkpoint:
        if checkpoint.format == "jint8":
            raise ValueError(
                f"{source}: Expected a checkpoint in floating point, got one that jint8 wrote, in int8 already: use it "
                "as it is, or quantize the one that it was made from"
            )
        config, selection = resolve_settings(
            checkpoint,
            config=options["config"],
            quantize=True,
            selection=Selection(options["skip"], options["include"]),
        )
        if args.dry_run:  # else it is said when the checkpoint is loaded
            _common.say_stored(args, checkpoint.config, config)
        model = build_decoder(checkpoint, default_dtype() if args.dtype is None else _common.float_dtype(args.dtype))
        targets = find_targets(checkpoint, model, config=config, selection=selection)
        if args.dry_run:
            say_what_differs(checkpoint, targets, config)
        return checkpoint.file_bytes, abstract_leaves(targets, config)


def _counts(planned: dict[str, Any]) -> dict[str, int]:
    from jint8._core.qtensor import is_qtensor

    quantized = sum(map(is_qtensor, planned.values()))
    return {"quantized": quantized, "skipped": len(planned) - quantized}
