"""Shapes from real models, for checks and benchmarks: (k, n) of projections, in the order in which they are timed."""

# The paper's feed-forward layers, d -> 4d (LLM.int8(), appendix D), and what the targets are stated for first.
PAPER_DIMS = (4096, 2048, 5140, 12288, 768, 1024, 1536, 2560)
FEED_FORWARD = {f"d={d}": (d, 4 * d) for d in PAPER_DIMS}

LLAMA = {
    "llama-8b qkv": (4096, 6144),
    "llama-8b gate_up": (4096, 28672),
    "llama-8b down": (14336, 4096),
    "llama-70b qkv": (8192, 10240),
    "llama-70b gate_up": (8192, 57344),
    "llama-70b down": (28672, 8192),
}
ROWS = (2048, 1, 16, 8192, 512, 8, 64)

# (m, n, k): tails in every dimension, one row and one channel, primes, k of one step and of many.
ODD = ((1, 1, 16), (3, 1001, 1001), (17, 33, 272), (67, 131, 509), (129, 257, 4112), (1000, 1536, 576))
REAL = ((1, 4096, 4096), (16, 14336, 4096), (64, 4096, 14336), (512, 8192, 2048), (2048, 3072, 768))
