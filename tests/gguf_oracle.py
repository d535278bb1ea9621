"""Blocks of GGUF in float64, value by value, as ggml describes each type. Shares no code with the library."""

import numpy as np
from gguf import GGMLQuantizationType as Q


def f16(block, at):
    return float(block[at : at + 2].view(np.float16)[0])


def nibble(qs, i):
    return int(qs[i % 16]) & 15 if i < 16 else int(qs[i % 16]) >> 4


def bit(block, at, i):
    return int(block[at + i // 8]) >> (i % 8) & 1


def q4_0(b):
    return [f16(b, 0) * (nibble(b[2:], i) - 8) for i in range(32)]


def q4_1(b):
    return [f16(b, 0) * nibble(b[4:], i) + f16(b, 2) for i in range(32)]


def q5_0(b):
    return [f16(b, 0) * (nibble(b[6:], i) + 16 * bit(b, 2, i) - 16) for i in range(32)]


def q5_1(b):
    return [f16(b, 0) * (nibble(b[8:], i) + 16 * bit(b, 4, i)) + f16(b, 2) for i in range(32)]


def q8_0(b):
    return [f16(b, 0) * int(v) for v in b[2:].view(np.int8)]


def scale_min(s, j):
    """The six-bit scale and minimum of sub-block `j` in the twelve bytes of Q4_K and Q5_K."""
    s = [int(v) for v in s]
    if j < 4:
        return s[j] & 63, s[j + 4] & 63
    return (s[j + 4] & 15) | (s[j - 4] >> 6) << 4, (s[j + 4] >> 4) | (s[j] >> 6) << 4


def k_value(b, i, quants, high):
    sub, lane = divmod(i, 32)
    byte = int(b[quants + 32 * (sub // 2) + lane])
    q = (byte >> 4 if sub % 2 else byte & 15) + (16 * (int(b[high + lane]) >> sub & 1) if high else 0)
    scale, minimum = scale_min(b[4:16], sub)
    return f16(b, 0) * scale * q - f16(b, 2) * minimum


def q4_k(b):
    return [k_value(b, i, 16, None) for i in range(256)]


def q5_k(b):
    return [k_value(b, i, 48, 16) for i in range(256)]


def q6_k(b):
    out = []
    for i in range(256):
        half, rest = divmod(i, 128)
        quarter, lane = divmod(rest, 32)
        low = int(b[64 * half + 32 * (quarter % 2) + lane])
        high = int(b[128 + 32 * half + lane]) >> (2 * quarter) & 3
        q = ((low >> 4 if quarter >= 2 else low & 15) | high << 4) - 32
        scale = int(
            b[192 + 8 * half + 2 * quarter + lane // 16 : 193 + 8 * half + 2 * quarter + lane // 16].view(np.int8)[0]
        )
        out.append(f16(b, 208) * scale * q)
    return out


ORACLES = {
    Q.Q4_0: (q4_0, (0,)), Q.Q4_1: (q4_1, (0, 2)), Q.Q5_0: (q5_0, (0,)), Q.Q5_1: (q5_1, (0, 2)), Q.Q8_0: (q8_0, (0,)),
    Q.Q4_K: (q4_k, (0, 2)), Q.Q5_K: (q5_k, (0, 2)), Q.Q6_K: (q6_k, (208,)),
}  # fmt: skip


def k_code(b, i):
    sub, lane = divmod(i, 32)
    byte = int(b[16 + 32 * (sub // 2) + lane])
    return byte >> 4 if sub % 2 else byte & 15


# The codes of a block's values, of the types that have four bits.
FOUR_BITS = {
    Q.Q4_0: lambda b: [nibble(b[2:], i) for i in range(32)],
    Q.Q4_1: lambda b: [nibble(b[4:], i) for i in range(32)],
    Q.Q4_K: lambda b: [k_code(b, i) for i in range(256)],
}
