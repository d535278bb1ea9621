"""Which feature dimensions of a model's activations are outliers.

By the paper's criteria: magnitude of --threshold or more in at least --layer-share of the layers and, there,
--position-share of the positions. The text goes through the model in sequences of --seq-len tokens; what remains is
dropped. JSON: threshold, relative, tokens, features (projection, dimension, layer_share, position_share, mean,
largest), projections (by name: layers, columns, and by layer numbers, outlier_columns, outlier_values, largest), plots,
html.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jint8.cli import _common

SUFFIXES = (".png", ".svg", ".pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("source", metavar="SRC", help=_common.SOURCE)
    parser.add_argument("--text", metavar="FILE", help="a text in UTF-8 (default: a short one of ours)")
    parser.add_argument("--seq-len", type=int, default=256, metavar="N", help="tokens per sequence (256)")
    parser.add_argument("--threshold", type=float, default=6.0, metavar="T", help="magnitude of an outlier (6)")
    parser.add_argument("--relative", action="store_true", help="the threshold is in mean magnitudes of the token")
    parser.add_argument("--layer-share", type=float, default=0.25, metavar="P", help="share of layers (0.25)")
    parser.add_argument("--position-share", type=float, default=0.06, metavar="P", help="share of positions (0.06)")
    _common.add_batch_argument(parser, "sequences per call")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N sequences")
    parser.add_argument("--plot", metavar="FILE", help="a map of layers and dimensions, as .png, .svg or .pdf")
    parser.add_argument("--plot-magnitudes", metavar="FILE", help="magnitudes by layer")
    parser.add_argument("--html", metavar="FILE", help="tables and both plots in one page")
    parser.add_argument("--float", action="store_true", help="of the model in floating point instead of int8")
    _common.add_dtype_argument(parser)
    _common.add_verify_argument(parser)
    _common.add_cache_argument(parser)
    _common.add_output_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    import numpy as np

    from jint8 import analysis
    from jint8.analysis._criteria import Criteria

    plots = {"plot_features": args.plot, "plot_magnitudes": args.plot_magnitudes}
    plots = {name: file for name, file in plots.items() if file is not None}
    _check_files(list(plots.values()), args.html)
    _common.check_least(args, seq_len=2, batch_size=1, limit=1)
    options = {"threshold": args.threshold, "relative": args.relative}
    criteria = {"layer_share": args.layer_share, "position_share": args.position_share}
    Criteria(**options, **criteria)  # checks them
    _common.check_loading(args)
    text = None if args.text is None else _common.read_text(args.text)
    source = _common.find_source(args, args.source)
    if args.float:
        _common.check_float(source, "--float")
    _common.use_compile_cache(args)
    model = _common.load(args, source, quantize=not args.float)
    sequences = model.batches(text, args.seq_len)[: args.limit]
    with _common.progress_bar(args, "reading", f"evaluating {len(sequences)} sequences", unit="seq") as progress:

        def counted():
            for done in range(0, len(sequences), args.batch_size):
                progress(done, len(sequences))
                yield np.concatenate(sequences[done : done + args.batch_size])

        found = analysis.outlier_statistics(model.run, {"params": model.params}, counted(), **options)
    for name, file in plots.items():
        getattr(analysis, name)(found).savefig(file)
    if args.html is not None:
        page = analysis.html_report(found, title=f"Outlier features of {Path(args.source).name}", **criteria)
        Path(args.html).write_text(page, encoding="utf-8")
    if args.json:
        tokens = sum(sequence.size for sequence in sequences)
        made = {"plots": list(plots.values()), "html": args.html}
        _common.report(args, {"tokens": tokens, **found.to_dict(**criteria), **made})
    else:
        print(found)


def _check_files(plots: list[str], html: str | None) -> None:
    """Raises what can be known before anything is loaded: ImportError, OSError or ValueError."""
    from jint8.analysis._plots import require_matplotlib

    for file in plots:
        if Path(file).suffix not in SUFFIXES:
            raise ValueError(f"{file}: Expected a name that ends in {', '.join(SUFFIXES)}")
    for file in [*plots, *([] if html is None else [html])]:
        _common.check_writable(file)
        require_matplotlib()
