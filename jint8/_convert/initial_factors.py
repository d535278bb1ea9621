"""PiSSA and OLoRA: adapters whose initial factors PEFT takes out of the weights below when it loads them.

PEFT computes the initial factors `B0 A0` from the weight `W`, loads the trained ones, and runs `(W - s B0 A0) + s B A`.
So does a model that keeps W and gets further factors, `[B, -B0]` and `[A; A0]`: W may be in int8 then, and is rounded
once. (PEFT rounds the difference to W's dtype, of which this has nothing.) Only their product counts, `B0 A0`:

- PiSSA: `U_r S_r V_r / s`, the r largest singular values of W; that is `P W / s`, P the projection on `U_r`;
- OLoRA: `Q_r R_r`, of `W = Q R`; that is `P W`, P the projection on the first r columns of W.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jint8.checkpoints import Checkpoint

FLOATS = ("F64", "F32", "F16", "BF16")
# Below this share of the largest singular value, float32 can't tell two directions apart, or one from none.
LEAST_GAP = 1e-5


def takes_initial_factors(init: Any) -> bool:
    """Whether `init_lora_weights` is one of those whose initial factors are known from the weight alone."""
    return init == "pissa" or (isinstance(init, str) and init.lower() == "olora")


def initial_factors(init: str, w: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """`A0[r, k]` and `B0[n, r]` of a weight `w[n, k]`, float64, and whether the scaling is in their product.

    Raises:
      ValueError: rounding decides what the factors are.
    """
    w = w.astype(np.float64)
    if init == "pissa":
        return *_largest(w, rank), True
    q, r = np.linalg.qr(w[:, :rank])
    sizes = np.abs(np.diag(r))
    if sizes.min(initial=np.inf) <= LEAST_GAP * np.abs(w).max(initial=0):
        raise ValueError(f"Expected the first {rank} columns to be independent for {init!r}, got others.")
    return q.T @ w, q, False


def _largest(w: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors of the part of `w` with the largest singular values, which are the roots of its Gram matrix's."""
    import scipy.linalg  # as in `lora`

    of_rows = w.shape[0] <= w.shape[1]
    gram = w @ w.T if of_rows else w.T @ w
    size = len(gram)
    squares, vectors = scipy.linalg.eigh(gram, subset_by_index=[max(size - rank - 1, 0), size - 1])
    values = np.sqrt(np.maximum(squares, 0))
    if rank < size and values[0] > LEAST_GAP * values[-1] and values[1] - values[0] <= LEAST_GAP * values[-1]:
        raise ValueError(f"Expected singular value {rank} to be above the next one for 'pissa', got equal ones.")
    vectors = vectors[:, -rank:]
    return (vectors.T @ w, vectors) if of_rows else (vectors.T, w @ vectors)


def float_weight(checkpoint: Checkpoint | None, name: str, transposed: bool, init: str, file: Path) -> np.ndarray:
    """The weight `[n, k]` that the initial factors are taken out of.

    Raises:
      ValueError: the checkpoint hasn't got it in floating point, or stores it so that PEFT can't run OLoRA.
    """
    found = None if checkpoint is None else checkpoint.tensors.get(name)
    if checkpoint is None or found is None or found.dtype not in FLOATS:
        where = "one in other numbers" if found is not None else "none"
        raise ValueError(
            f"{file}: Expected the checkpoint's {name!r} in floating point, out of which init_lora_weights={init!r} "
            f"takes its initial factors, got {where}. Load the original checkpoint, or convert the adapter to plain "
            "LoRA: save_pretrained of PEFT with path_initial_model_for_weight_conversion."
        )
    if transposed and init != "pissa":
        raise ValueError(
            f"{file}: Expected no init_lora_weights={init!r} for {name!r}, which is stored as [in, out]: PEFT would "
            "make factors of the wrong shapes."
        )
    value = checkpoint.read(name)
    return value.T if transposed else value


def with_initial(
    init: str, factors: tuple[np.ndarray, np.ndarray], w: np.ndarray, scaling: float
) -> tuple[np.ndarray, np.ndarray]:
    """`lora_a` and the scaled `lora_b` with those that take the initial product out of `w`, float32."""
    a, b = factors
    a0, b0, scaled = initial_factors(init, w, len(a))
    b0 = b0 if scaled else b0 * scaling
    return np.concatenate([a, a0.astype(np.float32)]), np.concatenate([b, -b0.astype(np.float32)], axis=1)
