"""The whole LLM.int8() product: checks its arguments, picks kernels and tiles, and calls the stages in order."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels.chips import CHIPS, Chip, current_chip
from pallas_kernels.configs import (
    Backend,
    FewRowsConfig,
    MosaicConfig,
    TileConfig,
    TritonConfig,
    check_config,
    default_configs,
    mosaic_supports,
    shape_class,
)
from pallas_kernels.triton.few_rows import Planes, int8_matmul_few_rows, quantize_few_rows
from pallas_kernels.triton.many_rows import int8_matmul_mixed_triton
from pallas_kernels.triton.outliers import outlier_columns
from pallas_kernels.triton.quantize_rows import DIGITS, QuantizedRows, gathered_size, quantize_rows
from pallas_kernels.triton.rotate_rows import ROTATED_BLOCKS, rotate_rows

Mode = Literal["batch", "token"]

_ALIGN = 16  # bytes that a thread loads at once, at addresses that are a multiple of it
_FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)


def _check(
    x: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    bias: jax.Array | None,
    threshold: float,
    mode: str,
    backend: str | None,
) -> None:
    if x.dtype not in _FLOATS:
        raise TypeError(f"Expected x to be bfloat16, float16 or float32, got {x.dtype}")
    if w.dtype != jnp.int8:
        raise TypeError(f"Expected w to be int8, got {w.dtype}")
    if w_scale.dtype != jnp.float32:
        raise TypeError(f"Expected w_scale to be float32, got {w_scale.dtype}")
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"Expected x[m, k] and w[n, k], got {x.shape} and {w.shape}")
    for name, a in (("w_scale", w_scale), ("bias", bias)):
        if a is not None and a.shape != w.shape[:1]:
            raise ValueError(f"Expected {name} to have shape {w.shape[:1]}, got {a.shape}")
    if not threshold >= 0:  # not "< 0": NaN is refused, too
        raise ValueError(f"Expected threshold to be at least 0, got {threshold}")
    if mode not in ("batch", "token"):
        raise ValueError(f"Expected mode to be 'batch' or 'token', got {mode!r}")
    if backend not in (None, "triton", "mosaic"):
        raise ValueError(f"Expected backend to be None, 'triton' or 'mosaic', got {backend!r}")


def _check_rotation(smooth: jax.Array | None, rotation: int, threshold: float, k: int) -> None:
    if rotation not in ROTATED_BLOCKS or k % rotation:
        raise ValueError(f"Expected rotation to be one of {ROTATED_BLOCKS} that divides k = {k}, got {rotation}")
    if smooth is None and rotation != 1:
        raise ValueError(f"Expected rotation with smooth, got {rotation} without")
    if smooth is not None and (smooth.shape != (k,) or smooth.dtype != jnp.float32):
        raise ValueError(f"Expected smooth to be float32{[k]}, got {smooth.dtype}{list(smooth.shape)}")
    if smooth is not None and threshold:
        raise ValueError(f"Expected threshold 0 with smooth: x has no outliers then; got {threshold}")


def _check_size(m: int, n: int, k: int) -> None:
    # Offsets within an array are 32 bits wide in the kernels: larger ones would turn negative.
    padded = gathered_size(k, 128)
    for shape in ((n, padded), (DIGITS, m, padded), (m, n)):  # outlier columns of w, digits, the result
        if math.prod(shape) >= 2**31:
            raise NotImplementedError(
                f"Expected arrays of fewer than 2**31 elements, got {shape} for m={m}, n={n}, k={k}"
            )


def _chip_for(backend: Backend | None) -> Chip:
    """The chip to take tiles for. Off a GPU, backend "mosaic" means Hopper (interpreted, or lowered for it)."""
    chip = current_chip()
    if backend != "mosaic" or chip.mosaic:
        return chip
    if jax.default_backend() == "gpu":
        raise NotImplementedError(f"Expected a Hopper GPU for backend 'mosaic', got {chip.name}")
    return CHIPS["sm_90"]


def pick_config(
    m: int,
    n: int,
    k: int,
    *,
    chip: Chip,
    backend: Backend | None = None,
    threshold: float = 6.0,
    dtype: DTypeLike = jnp.bfloat16,
) -> TileConfig:
    """The default tile for a product of x[m, k] and w[n, k].

    Args:
      m: rows of x.
      n: output channels.
      k: contracted size.
      chip: from `chip_for` or `current_chip`.
      backend: "triton" or "mosaic" for many rows; None is "mosaic" on Hopper. Few rows have one kernel.
      threshold: 0 for a product without outliers, whose x has one plane for few rows.
      dtype: of the result.

    Returns:
      The config; for few rows with as many splits of k as fill the chip. A Triton config where the Mosaic kernel
      doesn't support the shape.

    Examples:
      >>> from pallas_kernels.chips import CHIPS
      >>> pick_config(1, 1024, 4096, chip=CHIPS["sm_90"]).splits
      4
    """
    if backend is None:
        backend = "mosaic" if chip.mosaic else "triton"
    planes = 1 + DIGITS if threshold else 1
    config = default_configs()[chip.name, shape_class(m, n, chip=chip, backend=backend, planes=planes)]
    if isinstance(config, MosaicConfig) and not mosaic_supports(m, n, k, dtype, config):
        return pick_config(m, n, k, chip=chip, backend="triton", threshold=threshold)
    if isinstance(config, FewRowsConfig):
        # As many as give each multiprocessor one program, but at least four steps each, to fill the pipeline of loads.
        splits = min(chip.cores // pl.cdiv(n, config.bn), k // (4 * config.bk))
        config = dataclasses.replace(config, splits=max(1, splits))
    return config


def int8_matmul_mixed(
    x: QuantizedRows,
    w: jax.Array,
    w_scale: jax.Array,
    *,
    m: int,
    bias: jax.Array | None = None,
    dtype: DTypeLike,
    config: TritonConfig | MosaicConfig,
    interpret: bool = False,
) -> jax.Array:
    """y = (factors[0] * (q @ w.T) + outliers @ outlier_w.T) * w_scale + bias.

    With digits, `outliers` is the sum over p of factors[1 + p] * outliers[p]. Every product of integers is exact in
    int32; the rest is float32, rounded once. The outlier sums run over `x.number` columns, which the kernel reads from
    the device.

    Args:
      x: from `quantize_rows`, in the form and blocks of outliers that the config wants.
      w: int8[n, k].
      w_scale: float32[n].
      m: rows of the result; x may have been allocated with more, for whole tiles.
      bias: float[n] or None.
      dtype: of the result.
      config: the tile; its type picks the backend.
      interpret: run in Pallas's interpret mode.

    Returns:
      dtype[m, n].

    Raises:
      NotImplementedError: a Mosaic config for a shape or dtype that the kernel doesn't support.
      ValueError: an x whose rows aren't allocated for whole tiles of a Mosaic config.

    Examples:
      >>> rows = quantize_rows(jnp.array([[127.0, 2.0]]), interpret=True)
      >>> w, one = jnp.ones((1, 2), jnp.int8), jnp.ones(1)
      >>> int8_matmul_mixed(rows, w, one, m=1, dtype="float32", config=TritonConfig(), interpret=True).tolist()
      [[129.0]]
    """
    if isinstance(config, MosaicConfig):
        if not mosaic_supports(m, w.shape[0], w.shape[1], dtype, config):
            raise NotImplementedError(
                f"Expected at least a tile of {config} and a 16-bit result, got {w.shape} and {dtype}"
            )
        # Imported here: where a JAX comes without Mosaic GPU, the rest still works.
        from pallas_kernels.mosaic.many_rows import int8_matmul_mixed_mosaic

        return int8_matmul_mixed_mosaic(
            x,
            w,
            w_scale,
            m=m,
            bias=bias,
            dtype=dtype,
            config=config,
            cores=_chip_for("mosaic").cores,
            interpret=interpret,
        )
    return int8_matmul_mixed_triton(x, w, w_scale, bias=bias, dtype=dtype, config=config, interpret=interpret)


def llm_int8_matmul(
    x: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    *,
    bias: jax.Array | None = None,
    threshold: float = 6.0,
    mode: Mode = "batch",
    smooth: jax.Array | None = None,
    rotation: int = 1,
    dtype: DTypeLike | None = None,
    backend: Backend | None = None,
    config: TileConfig | None = None,
    interpret: bool = False,
) -> jax.Array:
    """x @ w.T * w_scale + bias on int8 tensor cores: x in int8, but its outliers with 22 bits.

    y = (s * (round(kept / s) @ w.T) + outliers @ w.T) * w_scale + bias, with s = max(abs(kept)) / 127 of each row. Both
    products are sums of integers, exact in int32, and the result is rounded once. One program with static shapes
    serves any number of outlier columns and never waits for the host.

    Args:
      x: bfloat16, float16 or float32[m, k].
      w: int8[n, k], in [-127, 127]. Where k isn't a multiple of 16, each call makes a padded copy: pad when quantizing.
      w_scale: float32[n].
      bias: float[n] or None.
      threshold: static; `abs(x) >= threshold` is an outlier, 0 turns the decomposition off.
      mode: "batch": all of a column in which any row has an outlier (the paper). "token": only the entries themselves,
        so that a row's result is bit for bit independent of the others.
      smooth: float32[k], by which x is multiplied where w's features were divided by it; without decomposition only.
      rotation: how many features of w were rotated together after that, of `rotate_rows.ROTATED_BLOCKS`.
      dtype: of the result; None is x.dtype.
      backend: "triton" or "mosaic" (Hopper; Triton for shapes and dtypes that `mosaic_supports` excludes); None is
        "mosaic" on Hopper and "triton" elsewhere. Only many rows have a choice.
      config: a tile instead of the table's. Its type decides the kernel: `FewRowsConfig` that for few rows, the others
        Triton's or Mosaic's for many; a `backend` that contradicts it is refused.
      interpret: run in Pallas's interpret mode.

    Returns:
      dtype[m, n]. Rows that hold NaN or infinity are not finite, others are unaffected.

    Raises:
      TypeError: for dtypes.
      ValueError: for shapes, a negative threshold, a rotation without smooth, smooth with a threshold, an unknown mode
        or backend, a config of another backend, or one that `check_config` refuses.
      NotImplementedError: arrays of 2**31 elements or more; "mosaic" on a GPU other than Hopper.

    Examples:
      >>> x = jnp.array([[100.0, 1.0, -0.5]])
      >>> w, scale = jnp.array([[127, 64, 0]], jnp.int8), jnp.array([0.5])
      >>> llm_int8_matmul(x, w, scale, interpret=True).tolist()
      [[6382.0]]

    References:
      LLM.int8(), equation 8 (https://arxiv.org/abs/2208.07339).
    """
    _check(x, w, w_scale, bias, threshold, mode, backend)
    _check_rotation(smooth, rotation, threshold, x.shape[1])
    (m, k), n = x.shape, w.shape[0]
    dtype = x.dtype if dtype is None else jnp.dtype(dtype)
    if dtype not in _FLOATS:
        raise TypeError(f"Expected dtype to be bfloat16, float16 or float32, got {dtype}")
    if 0 in (m, n, k):
        y = jnp.zeros((m, n), jnp.float32)
        return (y if bias is None else y + bias).astype(dtype)
    _check_size(m, n, k)
    if k % _ALIGN:
        # Rows that start at odd addresses compile to loads of single bytes, so copy the weights to aligned rows.
        pad = ((0, 0), (0, -k % _ALIGN))
        x, w, k = jnp.pad(x, pad), jnp.pad(w, pad), k + -k % _ALIGN
        smooth = None if smooth is None else jnp.pad(smooth, pad[1])
    if config is None:
        config = pick_config(m, n, k, chip=_chip_for(backend), backend=backend, threshold=threshold, dtype=dtype)
    else:
        own: Backend = "mosaic" if isinstance(config, MosaicConfig) else "triton"
        if backend not in (None, own):
            raise ValueError(f"Expected a config of backend {backend!r}, got {config}")
        check_config(config, _chip_for(own))

    # Few rows: quantize, multiply.
    if isinstance(config, FewRowsConfig):
        if smooth is None:
            planes = quantize_few_rows(x, threshold, per_token=mode == "token", interpret=interpret)
        else:
            turned = rotate_rows(x, smooth, rotation, interpret=interpret)
            planes = Planes(turned.q[None], turned.factors)
        return int8_matmul_few_rows(planes, w, w_scale, bias=bias, dtype=dtype, config=config, interpret=interpret)

    # Many rows in the weight's coordinates: smooth, rotate and quantize, multiply.
    if smooth is not None:
        rows = rotate_rows(x, smooth, rotation, height=config.height, interpret=interpret)
        return int8_matmul_mixed(rows, w, w_scale, m=m, bias=bias, dtype=dtype, config=config, interpret=interpret)

    # Many rows: find the outlier columns, quantize x and gather those columns of x and of the weights, multiply.
    form = config.outlier_form(x.dtype, per_token=mode == "token")
    rows = quantize_rows(
        x,
        w,
        outlier_columns(x, threshold, interpret=interpret) if threshold else None,
        form=form,
        block=config.outlier_block(form),
        # In mode "token" only some entries of an outlier column are outliers: the kernel compares again.
        threshold=threshold if mode == "token" else None,
        height=config.height,
        interpret=interpret,
    )
    return int8_matmul_mixed(rows, w, w_scale, m=m, bias=bias, dtype=dtype, config=config, interpret=interpret)
