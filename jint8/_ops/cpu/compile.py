"""Compiles the C++ of `src/` to a shared library. Imports nothing of jint8: the build hook runs this file by itself."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).parent / "src"
LIBRARY = Path("lib") / "libjint8_cpu.so"  # beside this file; in the package itself it would look like a module
# No -ffast-math: NaN, infinity and exact divisions are part of the results.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni")
# What each instruction set is compiled with; one that the compiler doesn't know is left out.
INSTRUCTION_SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "AVX2": AVX2,
        "AVXVNNI": (*AVX2, "-mavxvnni"),
        "AVX512VNNI": (*AVX2, *AVX512, "-mprefer-vector-width=512"),
        "AMX": (*AVX2, *AVX512, "-mprefer-vector-width=512", "-mamx-int8", "-mamx-tile"),
    },
    "aarch64": {"NEON": ("-march=armv8.2-a+dotprod",)},
}


def find_compiler() -> str | None:
    """The C++ compiler: `$CXX`, or the first of `g++`, `clang++` and `c++` that is there."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def build(compiler: str, include: str, out: Path) -> None:
    """Compiles the library to `out`, for this machine's kind of processors.

    Args:
      compiler: a C++ compiler that takes GCC's options.
      include: where the headers of XLA's FFI are, `jax.ffi.include_dir()`.
      out: the library.

    Raises:
      subprocess.CalledProcessError: the compiler failed; its messages are in `stderr`.
    """
    out.parent.mkdir(exist_ok=True)
    handlers = sorted(SOURCE.glob("*handler*.cc"))
    _build(compiler, handlers, [f"-I{include}"], out, ["-shared"])


def build_program(compiler: str, main: Path, out: Path, *, flags: Sequence[str] = ()) -> None:
    """Compiles `main`, which calls products without XLA, to a program `out`; `flags` such as those of sanitizers."""
    _build(compiler, [main], [f"-I{SOURCE}", *flags], out, flags, flags)


def _build(
    compiler: str,
    entries: Sequence[Path],
    entry_options: Sequence[str],
    out: Path,
    link_options: Sequence[str],
    flags: Sequence[str] = (),
) -> None:
    """Compiles `entries` and everything but the handlers, at the same time, and links all of it."""
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    with tempfile.TemporaryDirectory() as directory:

        def start(name: str, source: Path, options: Sequence[str]) -> tuple[subprocess.Popen[str], str]:
            target = os.path.join(directory, f"{name}.o")
            arguments = [compiler, *FLAGS, *flags, *options, "-c", str(source), "-o", target]
            return subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True), target

        def finish(process: subprocess.Popen[str], target: str) -> str:
            _, errors = process.communicate()
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, process.args, stderr=errors)
            return target

        started = [start(entry.stem, entry, entry_options) for entry in entries]
        started.append(start("generic", SOURCE / "kernels.cc", ["-DJINT8_GENERIC"]))
        sets = {
            name: start(name, SOURCE / "kernels.cc", [f"-DJINT8_{name}", *options])
            for name, options in INSTRUCTION_SETS.get(machine, {}).items()
        }
        objects, found = [], []
        for name, one in sets.items():
            try:
                objects.append(finish(*one))
            except subprocess.CalledProcessError:
                continue  # an older compiler
            found.append(f"-DJINT8_HAS_{name}")
        started += [start(name, SOURCE / f"{name}.cc", []) for name in ("decode", "projection")]
        started.append(start("product", SOURCE / "product.cc", found))
        objects += [finish(*one) for one in started]
        link = [compiler, *link_options, *objects, "-o", str(out), "-pthread"]
        subprocess.run(link, check=True, capture_output=True, text=True)
