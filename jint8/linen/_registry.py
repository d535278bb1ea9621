"""Which code runs a layer whose weights are int8: the registry, and the interceptor that looks into it."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

from flax import linen as nn

from jint8._core.config import Config
from jint8.linen._own_code import has_int8, note_where, own_params, run_own_code, run_setup, unbox

Handler = Callable[..., Any]

_HANDLERS: dict[tuple[type, str], Handler] = {}
# Set where standard layers quantize float kernels at each call (`Int8TransformerBlock`).
_float_config: contextvars.ContextVar[Config | None] = contextvars.ContextVar("float_config", default=None)
# Takes note of the layers that run in int8, so that whoever finds none can say so.
_ran_in_int8: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("ran_in_int8", default=None)


def register(layer_type: type[nn.Module], handler: Handler | None = None, *, method: str = "__call__") -> Any:
    """Teaches `jint8.apply` a layer: `handler` runs instead of a method of it wherever the layer has int8 weights.

    Few layers need one: without a handler a layer's own code runs, with its products in int8. It is for those that do
    more with a weight than multiply by it, rearrange it or look rows up, and for computing something else than they do.

    The handler is called as `handler(module, *args, **kwargs)`, with the arguments of the method, and computes its
    result with `jint8.matmul`, `jint8.einsum` or `jint8.dot_general` from `jint8.linen.param(module, name)`. It may
    return `NotImplemented` to run the layer's own code. Subclasses inherit a handler until they override the method;
    one that calls `super()` still reaches it.

    Args:
      layer_type: a linen module class.
      handler: the function; None returns a decorator.
      method: the method that it replaces.

    Returns:
      The handler, or a decorator for it.

    Raises:
      TypeError: `layer_type` isn't a linen module class or `handler` isn't callable.

    Examples:
      >>> import jax, jax.numpy as jnp, jint8
      >>> from flax import linen as nn
      >>> class Mine(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         return x @ self.param("weight", nn.initializers.normal(), (3, 4)).T
      >>> @jint8.linen.register(Mine)
      ... def mine(module, x):
      ...     return jint8.matmul(x, jint8.linen.param(module, "weight"), implementation="dequantize")
      >>> x = jnp.ones((1, 4))
      >>> params = jint8.quantize_params(Mine().init(jax.random.key(0), x))
      >>> jint8.apply(Mine().apply)(params, x).shape
      (1, 3)
    """
    if not (isinstance(layer_type, type) and issubclass(layer_type, nn.Module)):
        raise TypeError(f"Expected layer_type to be a linen module class, got {layer_type!r}.")
    if handler is None:
        return lambda handler: register(layer_type, handler, method=method)
    if not callable(handler):
        raise TypeError(f"Expected handler to be callable, got {handler!r}.")
    _HANDLERS[layer_type, method] = handler
    return handler


def param(module: nn.Module, name: str) -> Any:
    """A parameter of a bound module, out of its box (`nn.Partitioned`) if it is in one; None if there is none.

    Args:
      module: what a handler is called with.
      name: the parameter's.

    Returns:
      An array, a `QTensor` or None.

    Examples:
      >>> import jax.numpy as jnp, jint8
      >>> from flax import linen as nn
      >>> jint8.linen.param(nn.Dense(2).bind({"params": {"kernel": jnp.ones((3, 2))}}), "kernel").shape
      (3, 2)
    """
    return unbox(module.get_variable("params", name))


def float_config(module: nn.Module) -> Config | None:
    """How a handler quantizes a float kernel of `module` at this call; None: it doesn't."""
    config = getattr(module, "config", None)
    return config if isinstance(config, Config) else _float_config.get()


@contextlib.contextmanager
def int8_layers(config: Config | None = None) -> Iterator[list[str]]:
    """Layers called in this context use their int8 weights; with `config`, standard layers quantize float ones too.

    Yields a list, to which the class of each layer that runs in int8 is added.
    """
    ran: list[str] = []
    outer = _ran_in_int8.get()
    tokens = _float_config.set(config), _ran_in_int8.set(ran)
    try:
        with nn.intercept_methods(_intercept):
            yield ran
    finally:
        _float_config.reset(tokens[0])
        _ran_in_int8.reset(tokens[1])
        if outer is not None:
            outer.extend(ran)


def _intercept(next_fun, args, kwargs, context):
    module, method = context.module, context.method_name
    # A module's own `__getattr__` is intercepted too, and what follows looks attributes up: it would never end.
    if method.startswith("__") and method != "__call__":
        return next_fun(*args, **kwargs)
    if method == "setup":
        return run_setup(module, functools.partial(next_fun, *args, **kwargs))
    if _float_config.get() is None and not has_int8(own_params(module)):
        if float_config(module) is not None:  # a layer of `jint8.linen`, which quantizes its float kernel itself
            _note_int8(module)
        return next_fun(*args, **kwargs)
    handler = _find(type(module), method, context.orig_method)
    try:
        if handler is not None and (result := handler(module, *args, **kwargs)) is not NotImplemented:
            _note_int8(module)
            return result
    except Exception as error:
        note_where(error, module)
        raise
    if has_int8(own_params(module)):
        _note_int8(module)
    return run_own_code(module, functools.partial(next_fun, *args, **kwargs), method)


def _note_int8(module: nn.Module) -> None:
    if (ran := _ran_in_int8.get()) is not None:
        ran.append(type(module).__name__)


def _find(layer_type: type, method: str, orig_method: Any) -> Handler | None:
    """The handler of the class whose own code `orig_method` is."""
    code = _unwrapped(orig_method)
    for base in layer_type.__mro__:
        handler = _HANDLERS.get((base, method))
        if handler is not None:
            return handler if _unwrapped(getattr(base, method, None)) is code else None
    return None


def _unwrapped(method: Any) -> Any:
    """The function below `functools.partial` and linen's wrappers."""
    while (inner := getattr(method, "func", None) or getattr(method, "__wrapped__", None)) is not None:
        method = inner
    return method
