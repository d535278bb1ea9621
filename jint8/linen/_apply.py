"""`jint8.apply`: any linen module, and any other function, on int8 parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from jint8._core.config import Config, check_config
from jint8._core.qtensor import is_qtensor
from jint8._ops.stand_ins import TakesWeights, stand_ins
from jint8._tracing.substitute import UnsupportedUse, with_int8
from jint8._trees.left_out import say_left_out
from jint8._trees.params import with_config
from jint8.linen._registry import has_int8, int8_layers


def apply(apply_fn: Callable[..., Any], *, config: Config | None = None) -> Callable[..., Any]:
    """Makes a model run on a parameter tree with `QTensor`s, without changing it.

    The model may be any function of a pytree: plain JAX, haiku, equinox, keras. It is traced with float arrays in the
    place of the `QTensor`s among its arguments, as under `jit`, and runs with its products in int8, as long as it only
    multiplies by a weight, rearranges it or looks rows up: what `jint8.plan` calls contracted. That holds in loops and
    conditions, too.

    Of linen modules, `Dense`, `DenseGeneral`, `Einsum`, the projections of attention and `Embed` (both ways) multiply
    in int8 where their weight is a `QTensor`. So do all other layers with a `QTensor`: their own code runs likewise
    (`jint8.linen.register` is for those that do more with a weight).
    Everything else runs as it is, and nothing but looked-up rows is dequantized. Under `jit`, `vmap`, `grad` (with
    respect to anything in floating point) and `jax.checkpoint`, and inside the module under `nn.scan`, `nn.remat`,
    `nn.vmap`, `nn.jit`. A layer's `precision` is that of what its product computes in floating point (see
    `jint8.dot_general`); a custom `dot_general` doesn't apply to int8 products.

    Args:
      apply_fn: `module.apply`, or any function. One that calls linen modules leaves products with int8 weights to them.
      config: None means the one stored in each weight; else it replaces those, so that a function that was jitted
        before with another one is traced again.

    Returns:
      A function with the arguments and results of `apply_fn`. A `UserWarning` says so when it runs and there is no int8
      weight.

    Raises:
      TypeError: `apply_fn` isn't a function (a module itself isn't: give its `apply`), or `config` no `Config`. The
        returned function raises it for a layer or a function that needs the float values of an int8 weight, naming the
        layer's path.

    Examples:
      >>> import jax, jax.numpy as jnp, jint8
      >>> from flax import linen as nn
      >>> model, x = nn.Dense(4), jnp.ones((2, 8))
      >>> params = jint8.quantize_params(model.init(jax.random.key(0), x))
      >>> jax.jit(jint8.apply(model.apply))(params, x).shape
      (2, 4)

      >>> def apply_fn(params, x):
      ...     return jnp.tanh(x @ params["up"]) @ params["down"]
      >>> params = {"up": jnp.ones((8, 32)), "down": jnp.ones((32, 8))}
      >>> int8 = jint8.quantize_params(params, plan=jint8.plan(apply_fn, params, x))
      >>> jint8.apply(apply_fn)(int8, x).shape
      (2, 8)
    """
    if not callable(apply_fn) or isinstance(apply_fn, nn.Module):
        raise TypeError(f"Expected a function such as module.apply, got {type(apply_fn).__name__}.")

    if config is not None:
        check_config(config)
    may_be_plain = not _is_method_of_a_module(apply_fn)

    def int8_apply(*args, **kwargs):
        if config is not None:
            args = tuple(_replace_config(value, config) for value in args)
            kwargs = {name: _replace_config(value, config) for name, value in kwargs.items()}
        failed: Exception | None = None
        if may_be_plain and has_int8((args, kwargs)):
            try:
                return _run_plain(apply_fn, args, kwargs)
            except TakesWeights:
                pass
            except UnsupportedUse as error:
                raise TypeError(f"{_name(apply_fn)}: {error} {_LEFT_OUT}") from error
            except Exception as error:  # perhaps it takes `QTensor`s, and multiplies by them with jint8's functions
                failed = error
        try:
            with int8_layers() as ran:
                result = apply_fn(*args, **kwargs)
        except TypeError as error:
            if failed is not None and "QTensor" in str(error):  # it doesn't
                raise failed from None
            raise
        say_left_out(
            "jint8.apply",
            {},
            "Give it what jint8.quantize_params returns.",
            quantizes=bool(ran) or has_int8((args, kwargs)),
            nothing=f"there is no int8 weight among the arguments of {_name(apply_fn)}",
        )
        return result

    return functools.update_wrapper(int8_apply, apply_fn, updated=())


def _replace_config(value: Any, config: Config) -> Any:
    return with_config(value, config) if has_int8(value) else value


_LEFT_OUT = (
    "Leave that weight in floating point with skip= in jint8.quantize_params; jint8.plan says which can be int8."
)


def _is_method_of_a_module(function: Any) -> bool:
    """Whether a function is a module's method, or one below `functools.partial`, `jax.jit` and the like."""
    while (inner := getattr(function, "func", None) or getattr(function, "__wrapped__", None)) is not None:
        function = inner
    return isinstance(getattr(function, "__self__", None), nn.Module)


def _run_plain(apply_fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`apply_fn(*args, **kwargs)` with its products in int8.

    Raises:
      TakesWeights: it calls linen modules or functions of jint8; nothing was computed.
      UnsupportedUse: it needs the float values of a weight.
    """
    leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=is_qtensor)
    weights = {f"{i:08}": leaf for i, leaf in enumerate(leaves) if is_qtensor(leaf)}

    def run(floats: dict[str, jax.Array]) -> Any:
        args, kwargs = jax.tree.unflatten(tree, [floats.get(f"{i:08}", leaf) for i, leaf in enumerate(leaves)])
        with stand_ins(), nn.intercept_methods(_calls_linen):
            return apply_fn(*args, **kwargs)

    return with_int8(run, weights)


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _calls_linen(*_: Any) -> Any:
    """An interceptor: layers of linen know what to do with `QTensor`s."""
    raise TakesWeights
