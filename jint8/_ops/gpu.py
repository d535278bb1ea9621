"""The product in the Pallas kernels of `pallas_kernels`: what they can't compute, and how they are called.

On GPUs before compute capability 8.0, which the kernels don't compile for, XLA's product runs unless a kernel is asked
for by name.
"""

from __future__ import annotations

from typing import Literal, cast

import jax
from jax.typing import DTypeLike

from jint8._core.config import Config
from jint8._ops.activations import LARGEST_FLOAT
from jint8._ops.weight import MAX_K, Weight

BACKENDS = ("triton", "mosaic")


def unsupported(m: int, w: Weight, config: Config) -> str | None:
    """Why the kernels can't compute the product of `m` rows and `w`; None if they can."""
    scheme = config.table_row
    n, k = w.n, w.k
    if w.packing is not None:
        return "weights of four bits, which XLA multiplies on GPUs"
    if (scheme.activations, scheme.weights, scheme.affine) != ("token", "channel", False) or w.zero is not None:
        return f"scheme {config.scheme!r}, whose scales aren't one per token and output channel without zero points"
    if config.decomposes and config.relative:
        return "a threshold relative to the token"
    if config.digits != 1:
        return f"{config.digits} digits per activation"
    if k > MAX_K:
        return f"k = {k}, where sums of more than {MAX_K} products exceed int32"
    if not isinstance(m, int):  # as in an exported program with symbolic shapes
        return "a number of rows that isn't known when the program is made"
    if max(n * k, 3 * m * k, m * n) >= 2**31:
        return f"m = {m}, n = {n}, k = {k}, with arrays of 2**31 elements or more"
    return None


def kernel_product(
    x: jax.Array,
    w: Weight,
    bias: jax.Array | None,
    config: Config,
    dtype: DTypeLike,
    *,
    backend: str | None,
    interpret: bool = False,
) -> jax.Array:
    """`x[m, k]` times `w`, plus `bias[n]` -> `dtype[m, n]`, in the kernels. A weight in `[k, n]` order is transposed.

    `x` is smoothed and rotated as the weight is, by a kernel or, where that can't, by XLA. `backend` is of `BACKENDS`;
    None: the kernels' choice. `interpret`: in Pallas's interpret mode, slow, for tests.
    """
    # Imported here, because Pallas takes long to import and few processes need it.
    from pallas_kernels import ROTATED_BLOCKS, llm_int8_matmul

    if w.smooth is not None and w.block not in ROTATED_BLOCKS:
        x, w = w.coordinates(x), w.int8_alone()
    return llm_int8_matmul(
        x,
        w.q if w.k_last else w.q.T,
        w.scale,
        bias=bias,
        threshold=min(config.threshold, LARGEST_FLOAT) if config.decomposes else 0.0,
        mode="batch" if config.outliers == "batch" else "token",
        smooth=w.smooth,
        rotation=max(w.block, 1),
        dtype=dtype,
        backend=cast(Literal["triton", "mosaic"] | None, backend),
        interpret=interpret,
    )


def is_too_old() -> bool:
    """Whether the GPU is one that the kernels don't compile for."""
    from pallas_kernels.chips import LEAST_CAPABILITY, current_capability  # imported late, as in `kernel_product`

    capability = current_capability()
    return capability is not None and capability < LEAST_CAPABILITY
