"""Import of the packages that only checkpoints need (the extra `hf`), when they are needed."""

import importlib
from types import ModuleType


def require(module: str) -> ModuleType:
    """Import a package of the `hf` extra.

    Args:
      module: the name to import, such as `"gguf"`.

    Returns:
      The imported module.

    Raises:
      ImportError: it isn't installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as e:
        package = module.partition(".")[0]
        raise ImportError(
            f"Reading this checkpoint needs the package {package!r}: pip install 'jint8[hf]'", name=package
        ) from e
