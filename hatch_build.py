"""The build hook: compiles the CPU library when the package is installed, where there is a C++ compiler."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# Its headers describe how XLA calls a library; those of the oldest supported version work with all later ones.
HEADERS = "jaxlib==0.10.2"
PACKAGE = Path("jint8") / "_ops" / "cpu"


class CpuLibrary(BuildHookInterface):
    """Compiles `jint8/_ops/cpu/src` into the wheel, or into the checkout of an editable install.

    Without a compiler, or where it fails, jint8 is installed all the same and multiplies by XLA.
    `JINT8_BUILD_NATIVE=0` in the environment leaves it out.
    """

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        """What has to be installed for the build: nothing where nothing will be compiled."""
        return [HEADERS] if self._compiler() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles before files are collected."""
        if self.target_name != "wheel":
            return
        compiler = self._compiler()
        if compiler is None:
            self.app.display_warning("jint8: no C++ compiler found; products on CPUs will run in XLA, which is slower.")
            return
        library = PACKAGE / self._compile.LIBRARY
        try:
            self._compile.build(compiler, self._include(), Path(self.root) / library)
        except (OSError, subprocess.CalledProcessError, ImportError) as error:
            why = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or ["it failed"]
            self.app.display_warning(f"jint8: products on CPUs will run in XLA: {compiler} didn't compile: {why[0]}")
            return
        build_data["artifacts"].append(library.as_posix())
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{self._platform()}"

    @property
    def _compile(self) -> ModuleType:
        """`jint8._ops.cpu.compile`, without importing jint8, which needs JAX."""
        spec = importlib.util.spec_from_file_location("compile_cpu_library", Path(self.root) / PACKAGE / "compile.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def _compiler(self) -> str | None:
        return None if os.environ.get("JINT8_BUILD_NATIVE") == "0" else self._compile.find_compiler()

    def _include(self) -> str:
        import jaxlib

        return os.path.join(os.path.dirname(jaxlib.__file__), "include")

    def _platform(self) -> str:
        """The wheel's platform tag. The library uses no symbol of Python, so all versions share it."""
        import sysconfig

        return sysconfig.get_platform().replace("-", "_").replace(".", "_")
