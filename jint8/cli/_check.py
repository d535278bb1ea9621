"""Whether int8 does what it should: each int8 product beside its float result, on the activations of a text.

Says how many products ran in int8 and by which implementation, which are furthest from the float result, and what stays
in floating point and why. Each product gets the activations of the model in floating point, so that its error is its
own; that of the model's logits is where all errors add up. A checkpoint in int8 is compared with the one that it was
made from, which --float names; without it the weights are compared with themselves, and the errors are those of the
activations alone.

JSON: tokens, ran_int8, implementations (products by each), error (of the logits), weights_known, products (the worst
first: path, error, weight_error, implementations), skipped (path: reason).
"""

from __future__ import annotations

import argparse

from jint8.cli import _common, _float_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("source", metavar="SRC", help=_common.SOURCE)
    parser.add_argument("--text", metavar="FILE", help="a text in UTF-8 (default: a short one of ours)")
    parser.add_argument("--seq-len", type=int, default=256, metavar="N", help="tokens per sequence (256)")
    parser.add_argument("--limit", type=int, default=1, metavar="N", help="how many sequences, in one call (1)")
    parser.add_argument("--worst", type=int, default=10, metavar="N", help="how many products are shown (10)")
    _float_model.add_float_argument(parser)
    _common.add_model_arguments(parser)
    _common.add_adapter_argument(parser)
    _common.add_verify_argument(parser)
    _common.add_cache_argument(parser)
    _common.add_output_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    import numpy as np

    from jint8 import check

    _common.check_least(args, seq_len=2, limit=1, worst=1)
    config = _common.quant_config(args)
    text = None if args.text is None else _common.read_text(args.text)
    source = _common.find_source(args, args.source)
    float_source = source
    if args.float is not None:
        float_source = _float_model.find_float(args, source, "check")
    knows_floats = args.float is not None or _common.stored_int8(source) is None
    _common.use_compile_cache(args)
    model = _common.load(args, source, config=config)
    reference = _float_model.load_float(args, float_source, model) if knows_floats else model
    tokens = np.concatenate(model.batches(text, args.seq_len)[: args.limit])
    with _common.progress_bar(args, "checking", f"comparing products on {tokens.size} tokens", unit="seq"):
        int8 = {"params": model.params} if knows_floats else None
        found = check(model.run, {"params": reference.params}, tokens, int8=int8)
    if args.json:
        _common.report(args, {"tokens": int(tokens.size), **found.to_dict()})
    else:
        print(found.table(args.worst))
