"""Quality of int8 on SmolLM2-135M: perplexity, KL divergence from float32 and equal top tokens, scheme by scheme.

    jint8 demo && python benchmarks/quality.py

The text is the language reference that every Python carries (`pydoc_data.topics`), or any file; its SHA-256 is in the
result, results/quality.json. 32 sequences of 512 tokens, one to a call.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from harness import write

import jint8
from jint8._evaluate import evaluate
from jint8.cli._common import cache_directory
from jint8.cli._demo import FILE

SCHEMES = ("none", "llm.int8", "llm.int8-zp", "vector", "vector-zp", "row+dec", "row", "zeropoint", "absmax")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", nargs="?", default=cache_directory() / FILE)
    parser.add_argument("--text", type=Path, help="another text")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    args = parser.parse_args()
    text = args.text.read_text() if args.text else "\n\n".join(topics[name] for name in sorted(topics))
    reference = jint8.load(args.source, quantize=False)
    ids = reference.require_tokenizer().encode(text)[: args.sequences * args.seq_len]
    tokens = np.array(ids).reshape(args.sequences, args.seq_len)
    rows = {}
    for scheme in args.schemes:
        config = jint8.Config(scheme=scheme)
        model = reference if scheme == "none" else jint8.load(args.source, config=config)
        result = evaluate(model, tokens, reference=reference)
        rows[scheme] = {"perplexity": result.perplexity, "kl": result.kl, "top1": result.top1}
        print(
            f"{scheme:12} perplexity {result.perplexity:8.3f}  KL {result.kl:.4f}  top-1 {result.top1:.3f}", flush=True
        )
    name = str(args.text) if args.text else f"pydoc_data.topics of Python {sys.version.split()[0]}"
    sha = hashlib.sha256(text.encode()).hexdigest()
    print(write("quality", {"text": name, "sha256": sha, "tokens": list(tokens.shape), "schemes": rows}))


if __name__ == "__main__":
    main()
