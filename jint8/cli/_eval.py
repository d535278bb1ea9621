"""Perplexity of a model on a text, alone or against the model in floating point.

A checkpoint in int8 is compared with the one that it was made from, which --float names.

A text is tokenized once, as a whole, with the special tokens that the tokenizer adds (so a BOS, where it adds one, is
only at the very beginning), and cut into consecutive chunks of --seq-len tokens without overlap; what remains is
dropped. Each token but a chunk's first is scored given those before it. Outlier columns are decided per call, which is
one chunk unless --batch-size says otherwise.

No cache is needed for that. With --cache int8 keys and values go through one: each token reads those of all tokens up
to itself from it, as it would in decoding. The model in floating point goes without.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from jint8.cli import _common, _float_model, _generate

if TYPE_CHECKING:
    import numpy as np

    from jint8 import LanguageModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("source", metavar="SRC", help=_common.SOURCE)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", metavar="FILE", help="a text in UTF-8")
    what.add_argument("--tokens", metavar="FILE.npy", help="token ids [n, seq]; each row is one sequence")
    parser.add_argument("--seq-len", type=int, default=512, metavar="N", help="tokens per chunk of a text (512)")
    parser.add_argument("--compare", action="store_true", help="also run the model in floating point, and compare")
    _float_model.add_float_argument(parser, "; implies --compare")
    _common.add_batch_argument(parser, "sequences per call")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N sequences")
    _generate.add_kv_cache_argument(parser)
    _common.add_model_arguments(parser)
    _common.add_adapter_argument(parser)
    _common.add_verify_argument(parser)
    _common.add_cache_argument(parser)
    _common.add_output_arguments(parser)
    parser.set_defaults(dtype="float32")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from jint8 import evaluate, memory_report
    from jint8._trees.memory import projection_bytes

    _common.check_least(args, seq_len=2, batch_size=1, limit=1)
    config = _common.quant_config(args)
    given = _common.read_text(args.text) if args.tokens is None else read_tokens(args.tokens)
    source = _common.find_source(args, args.source)
    plain = config is not None and config.scheme == "none"
    compares = args.compare or args.float is not None
    is_reference = plain and args.float is None  # the model is in floating point itself
    if compares and not is_reference:
        float_source = _float_model.find_float(args, source, "--compare")
    _common.use_compile_cache(args)
    model = _common.load(args, source, config=config)
    tokens = _sequences(args, model, given)
    reference = None
    if compares:
        reference = model if is_reference else _float_model.load_float(args, float_source, model)
    begin = time.perf_counter()
    with _common.progress_bar(args, "scoring", f"evaluating {len(tokens)} sequences", unit="seq") as progress:
        options = {"batch_size": args.batch_size, "cache": args.cache, "progress": progress}
        found = evaluate(model, tokens, reference=reference, **options)
    result = {
        "perplexity": found.perplexity,
        "tokens": found.tokens,
        "scheme": model.quant.scheme,
        "threshold": model.quant.threshold if model.quant.decomposes else 0,
        "seconds": time.perf_counter() - begin,
        "weight_bytes": memory_report(model.params).bytes,
        "projection_bytes": projection_bytes(model.params),
    }
    if args.preset is not None:
        result["preset"] = args.preset
    if args.cache is not None:
        result["cache"] = args.cache
    if reference is not None:
        result |= {"kl": found.kl, "top1": found.top1, "float_perplexity": found.reference_perplexity}
    if args.json:
        _common.report(args, result)
    else:
        _print_table(result)


def read_tokens(file: str) -> np.ndarray:
    """Token ids `[n, s]` of a file. Raises ValueError where it has something else."""
    import numpy as np

    try:
        tokens = np.load(file, mmap_mode="r", allow_pickle=False)  # a damaged shape doesn't fill the memory
    except OSError:
        raise
    except Exception as error:  # NumPy has a Python parser look at the header, which raises errors of its own
        raise ValueError(f"{file}: Expected a .npy file of token ids, got: {error}") from None
    if not isinstance(tokens, np.ndarray):
        raise ValueError(f"{file}: Expected a .npy file of token ids, got several arrays (.npz)")
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise ValueError(f"{file}: Expected tokens of shape (n, s), n at least 1 and s at least 2, got {tokens.shape}")
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"{file}: Expected integer tokens, got {tokens.dtype}")
    return tokens


def _sequences(args: argparse.Namespace, model: LanguageModel, given: str | np.ndarray) -> np.ndarray:
    """The sequences to score, int `[n, s]`, of a text or of tokens."""
    from jint8._inference.evaluate import chunks

    tokens = chunks(model.require_tokenizer().encode(given), args.seq_len) if isinstance(given, str) else given
    return tokens[: args.limit]


def _print_table(result: dict) -> None:
    """The same for people."""
    scheme = result["scheme"] + (f" (threshold {result['threshold']:g})" if result["threshold"] else "")
    rows = {"preset": result["preset"]} if "preset" in result else {}
    rows |= {"cache": result["cache"]} if "cache" in result else {}
    rows |= {"scheme": scheme, "perplexity": f"{result['perplexity']:.4f}"}
    if "kl" in result:
        rows["perplexity in float"] = f"{result['float_perplexity']:.4f}"
        rows["KL from float"] = f"{result['kl']:.5f} nats per token"
        rows["equal top-1"] = f"{100 * result['top1']:.2f} %"
    rows["tokens"] = f"{result['tokens']:,} in {result['seconds']:.1f} s"
    rows["weights"] = _common.megabytes(result["weight_bytes"])
    rows["projections"] = _common.megabytes(result["projection_bytes"])
    for name, value in rows.items():
        print(f"{name:20} {value}")
