"""Speed and memory: int8 against the same model in floating point, in one run.

The two take turns, and medians are reported, so that a busy machine slows both. Prompts are random tokens. Decoding is
also set against the machine: bytes of weights that are read for each step, as a share of the bytes per second that a
float32 matrix-vector product reads here ("roofline"). A checkpoint in int8 is set against the one that it was made
from, which --float names.

JSON: prefill_tokens_per_s and decode_tokens_per_s {int8, float} at the first --batch-size; weight_bytes {int8, float};
first_token_s {int8, float}, with compilation; batches: the same by batch size, with decode_roofline {int8, float};
read_bytes_per_s; prompt_tokens, new_tokens; cache: the kind of the int8 model's, null for floats.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING, Any

from jint8.cli import _common, _float_model, _generate

if TYPE_CHECKING:
    from jint8 import LanguageModel

KINDS = ("int8", "float")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("source", metavar="SRC", help=_common.SOURCE)
    _float_model.add_float_argument(parser)
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="tokens of each prompt (512)")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="tokens to decode (32)")
    parser.add_argument(
        "--batch-size", type=int, action="append", metavar="N", help="prompts at once; may be repeated (1, 4, 16)"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed runs of each (5)")
    _generate.add_kv_cache_argument(parser, " (of the model in int8; the other one keeps floats)")
    _common.add_model_arguments(parser)
    _common.add_verify_argument(parser)
    _common.add_cache_argument(parser)
    _common.add_output_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    import jax

    from jint8 import memory_report
    from jint8._ops.cpu import native

    batches = args.batch_size or [1, 4, 16]
    _common.check_least(args, prompt_tokens=1, new_tokens=1, repeats=1)
    if min(batches) < 1:
        raise ValueError(f"Expected --batch-size to be at least 1, got {min(batches)}")
    config = _common.quant_config(args)
    source = _common.find_source(args, args.source)
    float_source = _float_model.find_float(args, source, "a comparison")
    _common.use_compile_cache(args)
    int8 = _common.load(args, source, config=config)
    models = {"int8": int8, "float": _float_model.load_float(args, float_source, int8)}
    limit = models["int8"].config.max_positions
    if limit and args.prompt_tokens + args.new_tokens > limit:
        raise ValueError(f"Expected at most {limit} tokens, which is what the model is made for, got more")
    weight_bytes = {kind: memory_report(model.params).bytes for kind, model in models.items()}
    read_bytes_per_s = _read_bytes_per_s()
    result: dict[str, Any] = {"weight_bytes": weight_bytes, "read_bytes_per_s": read_bytes_per_s, "batches": {}}
    for batch in dict.fromkeys(batches):
        measured = _measure(args, models, batch)
        for kind, model in models.items():
            steps_per_s = measured["decode_tokens_per_s"][kind] / batch
            share = steps_per_s * _bytes_per_step(model) / read_bytes_per_s
            measured.setdefault("decode_roofline", {})[kind] = share
        result["batches"][str(batch)] = measured
        _print_batch(args, batch, measured)
    result |= {"prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens, "cache": args.cache}
    library = native.kernels() if jax.default_backend() == "cpu" else None
    result["cpu_library"] = library
    first = result["batches"][str(batches[0])]
    result |= {name: first[name] for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "first_token_s")}
    if args.json:
        _common.report(args, result)
    else:
        sizes = ", ".join(f"{_common.megabytes(size)} in {kind}" for kind, size in weight_bytes.items())
        print(f"weights: {sizes}; a float32 product reads {read_bytes_per_s / 1e9:.1f} GB/s here")
        if library:
            print(f"products on the CPU: in the compiled library, with its kernels for {library}")


def _measure(args: argparse.Namespace, models: dict[str, LanguageModel], batch: int) -> dict[str, dict[str, float]]:
    import numpy as np

    rng = np.random.default_rng(0)
    vocabulary = models["int8"].config.vocab_size
    prompts = rng.integers(0, vocabulary, (batch, args.prompt_tokens)).tolist()
    prefill: dict[str, list[float]] = {kind: [] for kind in KINDS}
    decode: dict[str, list[float]] = {kind: [] for kind in KINDS}
    caches = {"int8": args.cache, "float": None}
    first = {kind: _time(args, models[kind], prompts, caches[kind])[0] for kind in KINDS}  # compiles
    with _common.progress_bar(args, f"batch {batch}", unit="run") as progress:
        for repeat in range(args.repeats):
            for kind in KINDS:
                first_s, tokens_per_s = _time(args, models[kind], prompts, caches[kind])
                prefill[kind].append(batch * args.prompt_tokens / first_s)
                decode[kind].append(tokens_per_s)
            progress(repeat + 1, args.repeats)
    return {
        "prefill_tokens_per_s": {kind: statistics.median(prefill[kind]) for kind in KINDS},
        "decode_tokens_per_s": {kind: statistics.median(decode[kind]) for kind in KINDS},
        "first_token_s": first,
    }


def _time(
    args: argparse.Namespace, model: LanguageModel, prompts: list[list[int]], cache: str | None
) -> tuple[float, float]:
    """Seconds to the first token of each prompt, and tokens per second from there on.

    `generate_tokens` yields the first token from prefill alone, before it decodes.
    """
    begin = time.perf_counter()
    chunks = model.generate_tokens(prompts, max_tokens=args.new_tokens + 1, every=args.new_tokens, cache=cache)
    next(chunks)
    first = time.perf_counter()
    tokens = sum(chunk.size for chunk in chunks)
    return first - begin, tokens / (time.perf_counter() - first)


def _bytes_per_step(model: LanguageModel) -> int:
    """Bytes of weights that one step of decoding reads.

    All of them, but of an embedding only one row; where it is the output head as well, the head reads all of it.
    """
    from jint8 import memory_report

    total = memory_report(model.params).bytes
    if model.config.tie_embeddings:
        return total
    return total - memory_report({"embedding": model.params["embedding"]}).bytes


def _read_bytes_per_s() -> float:
    """How fast a float32 matrix-vector product reads its weights, median of five: decoding can't be faster."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.random((4096, 8192), np.float32))  # 134 MB: more than caches hold
    x = jnp.asarray(rng.random((1, 4096), np.float32))
    product = jax.jit(jnp.matmul)
    seconds = []
    for _ in range(6):  # the first one compiles
        begin = time.perf_counter()
        jax.block_until_ready(product(x, w))
        seconds.append(time.perf_counter() - begin)
    return w.nbytes / statistics.median(seconds[1:])


def _print_batch(args: argparse.Namespace, batch: int, measured: dict[str, dict[str, float]]) -> None:
    """One batch size for people, as soon as it is measured."""
    if args.json:
        return
    for what, key in (("prefill", "prefill_tokens_per_s"), ("decode", "decode_tokens_per_s")):
        int8, float_ = (measured[key][kind] for kind in KINDS)
        line = (
            f"batch {batch:3}  {what:8} {int8:9.1f} tokens/s in int8, {float_:9.1f} in float, {int8 / float_:.2f} times"
        )
        if what == "decode":
            line += f", {100 * measured['decode_roofline']['int8']:.0f} % of the roofline"
        print(line, flush=True)
