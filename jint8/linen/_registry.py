"""Which code runs a layer whose weights are int8: the registry, and the interceptor that looks into it."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import linen as nn
from flax.errors import FlaxError, ScopeParamShapeError
from flax.linen import meta

from jint8._types import Config, is_qtensor

Handler = Callable[..., Any]

_HANDLERS: dict[tuple[type, str], Handler] = {}
_NOTE = "jint8: in "
# Set where standard layers quantize float kernels at each call (`Int8TransformerBlock`).
_float_config: contextvars.ContextVar[Config | None] = contextvars.ContextVar("float_config", default=None)


def register(layer_type: type[nn.Module], handler: Handler | None = None, *, method: str = "__call__") -> Any:
    """Teaches `jint8.apply` a layer: `handler` runs instead of a method of it wherever the layer has int8 weights.

    The handler is called as `handler(module, *args, **kwargs)`, with the arguments of the method, and computes its
    result with `jint8.matmul`, `jint8.einsum` or `jint8.dot_general` from `jint8.linen.param(module, name)`. It may
    return `NotImplemented` to run the layer's own code. Subclasses inherit a handler until they override the method;
    one that calls `super()` still reaches it.

    Weights of registered layers may be stored in another order than the layer declares, with the contracted axes last.
    Where a layer declares its parameters in `setup()` instead of a compact method, linen refuses that:
    give `jint8.quantize_params` their paths as `keep_order`.

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
      ...     return jint8.matmul(x, jint8.linen.param(module, "weight"))
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


def unbox(value: Any) -> Any:
    """The content of a box. Not `.unbox()`, which may constrain shardings by the names of the float weight's axes."""
    while isinstance(value, meta.AxisMetadata):
        value = value.value if hasattr(value, "value") else value.unbox()
    return value


def float_config(module: nn.Module) -> Config | None:
    """How a handler quantizes a float kernel of `module` at this call; None: it doesn't."""
    config = getattr(module, "config", None)
    return config if isinstance(config, Config) else _float_config.get()


@contextlib.contextmanager
def int8_layers(config: Config | None = None) -> Iterator[None]:
    """Layers called in this context use their int8 weights; with `config`, standard layers quantize float ones too."""
    token = _float_config.set(config)
    try:
        with nn.intercept_methods(_intercept):
            yield
    finally:
        _float_config.reset(token)


def _intercept(next_fun, args, kwargs, context):
    module, method = context.module, context.method_name
    if method == "setup":
        return _setup(next_fun, args, kwargs, module)
    if _float_config.get() is None and not has_int8(own_params(module)):
        return next_fun(*args, **kwargs)
    handler = _find(type(module), method, context.orig_method)
    if handler is not None:
        try:
            result = handler(module, *args, **kwargs)
        except Exception as error:
            error.add_note(f"{_NOTE}{_where(module)}")
            raise
        if result is not NotImplemented:
            return result
    try:
        return next_fun(*args, **kwargs)
    except (TypeError, AttributeError, FlaxError) as error:
        names = _int8_names(module)
        if not names or any(note.startswith(_NOTE) for note in getattr(error, "__notes__", ())):
            raise
        raise TypeError(
            f"Expected a layer that jint8 knows, got {_where(module)} with int8 weights ({', '.join(names)}) and no "
            f"handler for {method}: it failed with {type(error).__name__}. Teach it with jint8.linen.register, or "
            "leave it in floating point with skip= in jint8.quantize_params."
        ) from error


def _setup(next_fun, args, kwargs, module):
    try:
        return next_fun(*args, **kwargs)
    except ScopeParamShapeError as error:
        names = _int8_names(module)
        if not names:
            raise
        path = "/".join((*module.path, names[0]))
        raise ValueError(
            f"Expected the weights of {_where(module)} in their own order, because it declares them in setup(), got "
            f"contracted axes last. Quantize them with keep_order={path!r}."
        ) from error


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


def _int8_names(module: nn.Module) -> list[str]:
    """Names of the int8 weights that lie directly in the module's scope (shared scopes: also those of others)."""
    return [name for name, value in own_params(module).items() if is_qtensor(unbox(value))]


def own_params(module: nn.Module) -> Any:
    """The parameters in a module's scope; for a wrapper such as `nn.WeightNorm`, those of the layer that it wraps."""
    module = getattr(module, "layer_instance", module)
    return {} if module.scope is None else module.variables.get("params", {})


def _where(module: nn.Module) -> str:
    return f"{'/'.join(module.path) or 'the outermost module'} ({type(module).__name__})"


def has_int8(tree: Any) -> bool:
    """Whether any leaf is a `QTensor`."""
    return any(is_qtensor(leaf) for leaf in jax.tree.leaves(tree, is_leaf=is_qtensor))
