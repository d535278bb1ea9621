"""Add a LoRA adapter to the weights of a model, and save it.

SRC may be in int8: its weights are dequantized, added to, and quantized as they were. What that changes is printed: the
relative error of each weight. DST appears complete or not at all (docs/reliability.md has the exceptions). JSON: files
(how many were written), bytes_out (of all files written), errors (of each merged weight, by name).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jint8.cli import _common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("source", metavar="SRC", help=_common.SOURCE)
    parser.add_argument("adapter", metavar="ADAPTER", help="a LoRA adapter that PEFT saved")
    parser.add_argument("destination", metavar="DST", help="a directory that isn't there yet")
    parser.add_argument(
        "--format",
        choices=("jint8", "bitsandbytes"),
        default="jint8",
        help="bitsandbytes: as PyTorch's transformers saves a model that it loaded with load_in_8bit",
    )
    _common.add_dtype_argument(parser)
    _common.add_verify_argument(parser)
    _common.add_output_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from jint8 import merge_adapter
    from jint8._inference.save import write_model
    from jint8.checkpoints._destination import Destination

    _common.check_loading(args)
    destination = Path(args.destination)
    with Destination(destination, lambda text: _common.say(args, text)) as place:
        source = _common.find_source(args, args.source)
        model, errors = merge_adapter(_common.load(args, source))
        write_model(place, model, format=args.format)
        _common.complete(args)
    sizes = [file.stat().st_size for file in destination.iterdir()]
    if args.json:
        _common.report(args, {"files": len(sizes), "bytes_out": sum(sizes), "errors": errors})
        return
    worst = max(errors, key=errors.__getitem__)
    print(f"{len(errors)} weights merged, relative error at most {errors[worst]:.2g} ({worst})")
    print(f"{_common.megabytes(sum(sizes))} written to {destination} in {len(sizes)} files")
