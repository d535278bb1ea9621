"""Import of the packages that only checkpoints need."""

import importlib
from types import ModuleType


def require(module: str) -> ModuleType:
    """Import a package of the `hf` extra.

    Args:
        module: The name to import, such as `"gguf"`.

    Returns:
        The imported module.

    Raises:
        ImportError: If it isn't installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as e:
        package = module.partition(".")[0]
        raise ImportError(
            f"Reading this checkpoint needs the package {package!r}: pip install 'jint8[hf]'", name=package
        ) from e
