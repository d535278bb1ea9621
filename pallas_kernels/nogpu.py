"""Compiles the kernels to machine code on a machine without a GPU and reads what they use.

`python -m pallas_kernels.nogpu` prints a table: registers, spilled bytes, shared memory and tensor-core instructions
for every default config and chip. It needs the packages of the extra `nogpu` in exactly jax's version (README.md beside
this file).

The CUDA plugin compiles for a device that is only described as well as for one that is there. XLA dumps the PTX of each
kernel, ptxas turns it into machine code and reports the resources, nvdisasm lists the instructions. The dump is
configured by environment variables that must be set before JAX starts, and Mosaic reads the chip once per process: so
each chip gets a process of its own.

The names of XLA's dump files and Mosaic's MOSAIC_GPU_DUMP_* variables aren't stable interfaces, but no other way leads
to the machine code. They are used in this file only, which only tests and `tune.py` import. Checked on JAX 0.10.2,
0.11.2 and 0.12.0.1.
"""

import argparse
import collections
import glob
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels._described_device import device_for
from pallas_kernels._numerics import DIGITS
from pallas_kernels.chips import CHIPS, Chip
from pallas_kernels.configs import FEW_ROWS, FewRowsConfig, TileConfig, default_configs, from_json, to_json
from pallas_kernels.machine_code import TENSOR_CORE, Loop, loops
from pallas_kernels.matmul import llm_int8_matmul

# The environment variable through which `run` tells its child process where XLA dumps to.
_DUMP = "PALLAS_KERNELS_NOGPU_DUMP"
_PACKAGES = ("jax-cuda13-plugin", "jax-cuda13-pjrt")

# Triton kernels are named after their functions, all of which end so; Mosaic kernels end in "_mosaic_gpu_kernel".
_KERNEL_SUFFIX = "_kernel"

# Chips that take the tiles of older ones, to compile for: shared memory and multiprocessors are those of the GPU named.
BLACKWELL = {
    chip.name: chip
    for chip in (
        Chip(
            name="sm_100",
            device_kind="NVIDIA B200",
            products=("B200",),
            capabilities=((10, 0),),
            shared_bytes=232448,
            cores=148,
        ),
        Chip(
            name="sm_120",
            device_kind="NVIDIA GeForce RTX 5090",
            products=("RTX 5090",),
            capabilities=((12, 0),),
            shared_bytes=101376,
            cores=170,
            threads=1536,
        ),
    )
}


class Case(NamedTuple):
    """What is compiled."""

    config: TileConfig
    size: tuple[int, int, int]  # m, n, k
    threshold: float
    rotation: int = 0  # how many features are rotated together, after smoothing; 0: neither


@dataclass(frozen=True)
class Kernel:
    """What one kernel uses.

    Attributes:
      name: of the machine code.
      registers: per thread, says ptxas.
      spilled: bytes that didn't fit the registers, stored and loaded.
      shared: bytes of shared memory, says XLA; None where Mosaic launches the kernel itself.
      tensor_core: instruction -> how often it occurs in the code.
      async_loads: how many instructions copy from device to shared memory in the background.
      loops: what a step of each loop with tensor-core instructions does.
    """

    name: str
    registers: int
    spilled: int
    shared: int | None
    tensor_core: dict[str, int]
    async_loads: int
    loops: list[Loop]


def missing() -> str | None:
    """Why kernels can't be compiled here, or None: the packages of the extra `nogpu` must have jax's version.

    Returns:
      A sentence that names the packages and the command that installs them, or None.
    """
    command = (
        f"pip install --no-deps jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__} "
        "nvidia-cuda-nvcc nvidia-cuda-nvdisasm"
    )
    for package in _PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"{package} is not installed: {command}"
        if version != jax.__version__:
            return f"{package} {version} is not of jax's version {jax.__version__}: {command}"
    for name in ("ptxas", "nvdisasm"):
        if _find_tool(name) is None:
            return f"{name} is not installed: {command}"
    return None


def toolchain() -> str:
    """The versions that decide what the machine code is: of JAX and of the assembler. A key of `resources.json`."""
    return f"jax {jax.__version__}, nvidia-cuda-nvcc {importlib.metadata.version('nvidia-cuda-nvcc')}"


def _find_tool(name: str) -> str | None:
    found = (hit for path in sys.path for hit in glob.glob(f"{path}/nvidia/*/bin/{name}"))
    return next(found, None) or shutil.which(name)


def _run_tool(name: str, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run([str(_find_tool(name)), *args], capture_output=True, text=True, check=True)


def compile_kernels(fn: Callable[..., jax.Array], chip: Chip, *avals: jax.ShapeDtypeStruct) -> list[Kernel]:
    """Compiles a function for a chip and disassembles the package's kernels; only in a process that `run` started."""
    dump = Path(os.environ[_DUMP])
    for file in dump.iterdir():
        file.unlink()
    device = device_for(chip)
    sharding = jax.sharding.SingleDeviceSharding(device)
    with jax.default_device(device):  # the lowerings of Triton and of Mosaic read the architecture from it
        args = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in avals]
        jax.jit(fn).lower(*args).compile()
    launches = "".join(file.read_text() for file in dump.glob("*.thunk_sequence.txt"))
    shared = {name: int(size) for name, size in re.findall(r"(\w+) grid:.*shared_memory: (\d+) bytes", launches)}
    kernels = []
    for file in sorted(dump.glob("*.ptx")):
        ptx = file.read_text()
        entry, target = re.search(r"\.entry (\w+)", ptx), re.search(r"\.target (\w+)", ptx)
        if entry and target and entry[1].endswith(_KERNEL_SUFFIX):  # not one of XLA's own
            kernels.append(_assemble(file, entry[1], target[1], shared.get(entry[1])))
    return sorted(kernels, key=lambda kernel: kernel.name)


def _assemble(ptx: Path, name: str, target: str, shared: int | None) -> Kernel:
    cubin = f"{ptx}.cubin"
    report = _run_tool("ptxas", f"-arch={target}", "-v", str(ptx), "-o", cubin).stderr
    code = _run_tool("nvdisasm", "-c", cubin).stdout
    registers = re.search(r"Used (\d+) registers", report)
    assert registers is not None, report
    return Kernel(
        name=name,
        registers=int(registers[1]),
        spilled=sum(int(size) for size in re.findall(r"(\d+) bytes spill (?:stores|loads)", report)),
        shared=shared,
        tensor_core=dict(sorted(collections.Counter(TENSOR_CORE.findall(code)).items())),
        async_loads=len(re.findall(r"\b(?:LDGSTS|UTMALDG)\b", code)),
        loops=loops(code),
    )


def cases(chip: Chip) -> dict[str, Case]:
    """What the check compiles for a chip, by label.

    Every default config at shapes that its tiles divide, with and without outliers, and the first of a kind at odd
    shapes too.
    """
    found: dict[str, Case] = {}
    configs: dict[TileConfig, str] = {}
    for (name, shape), config in default_configs().items():
        if name == chip.name:
            configs.setdefault(config, shape)
    for config, shape in configs.items():
        if isinstance(config, FewRowsConfig):
            rows = config.rows // (1 + DIGITS)  # of x, in each of its planes
            for m in (1, rows) if rows == 4 else (rows,):
                found[f"{shape} rows={m}"] = Case(config, (m, 14336, 4096), 6.0)
            found[f"{shape} threshold=0"] = Case(config, (min(FEW_ROWS, config.rows), 4096, 14336), 0.0)
            found[f"{shape} odd"] = Case(config, (rows - 1, 1001, 1001), 6.0)
        else:
            found[shape] = Case(config, (2048, 4096, 4096), 6.0)
            found[f"{shape} threshold=0"] = Case(config, (2048, 4096, 4096), 0.0)
            odd = (1001, 1001, 1001) if config.kind == "triton" else (1001, 960, 960)  # whose weights have whole tiles
            found[f"{shape} odd"] = Case(config, odd, 6.0)
    few, shape = next((config, shape) for config, shape in configs.items() if isinstance(config, FewRowsConfig))
    for rotation, k in ((64, 4096), (64, 14336), (64, 576), (32, 4096), (16, 4096), (1, 4096)):
        found[f"{shape} rotation={rotation} k={k}"] = Case(few, (1, 4096, k), 0.0, rotation)
    return found


def _operands(m: int, n: int, k: int) -> list[jax.ShapeDtypeStruct]:
    f32 = jnp.float32
    shapes = ((m, k), jnp.bfloat16), ((n, k), jnp.int8), ((n,), f32), ((n,), f32)
    return [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]


def _compile_cases(chip: Chip, cases: dict[str, tuple]) -> dict[str, list[dict]]:
    """label -> kernels, each as a dict; in the child process of `run`. `cases` are as in `run`, the configs in JSON."""
    result = {}
    for label, (entry, size, threshold, rotation) in cases.items():
        config = from_json(entry)

        def fn(x, w, scale, bias, *smooth, config=config, threshold=threshold, rotation=rotation):
            inside = {"smooth": smooth[0], "rotation": rotation} if smooth else {}
            return llm_int8_matmul(x, w, scale, bias=bias, threshold=threshold, config=config, **inside)

        operands = _operands(*size)
        if rotation:
            operands.append(jax.ShapeDtypeStruct(size[2:], jnp.float32))
        try:
            kernels = compile_kernels(fn, chip, *operands)
        except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
            print(f"{label}: {error}", file=sys.stderr)
            kernels = []
        result[label] = [asdict(kernel) for kernel in kernels]
    return result


def run(chip: Chip, chosen: dict[str, Case] | None = None) -> dict[str, list[dict]]:
    """Compiles cases for a chip in a process of its own.

    Args:
      chip: an entry of `CHIPS` or `BLACKWELL`.
      chosen: label -> case; None for `cases(chip)`.

    Returns:
      label -> the package's kernels in the compiled program, each as a dict of `Kernel`; none where it doesn't compile.

    Raises:
      RuntimeError: the process failed; with the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as dump:
        environment = dict(
            os.environ,
            JAX_PLATFORMS="cpu",  # the CUDA plugin registers all the same
            XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={dump} --xla_dump_emitter_re=ptx",
            MOSAIC_GPU_DUMP_PTX="1",
            MOSAIC_GPU_DUMP_TO=dump,
            **{_DUMP: dump},
        )
        command = [sys.executable, "-W", "ignore", "-m", "pallas_kernels.nogpu", "--child", chip.name]
        given = {
            label: (to_json(config), size, threshold, rotation)
            for label, (config, size, threshold, rotation) in (cases(chip) if chosen is None else chosen).items()
        }
        done = subprocess.run(
            command, env=environment, input=json.dumps(given), capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise RuntimeError(
            f"Expected to compile for {chip.name}, got exit status {done.returncode}: {done.stderr[-4000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def table(resources: dict[str, dict[str, list[dict]]]) -> str:
    """The resources as lines of text: chip, case, kernel, registers, spilled bytes, instructions."""
    lines = []
    for chip, by_case in resources.items():
        for label, kernels in by_case.items():
            for k in kernels:
                ops = " ".join(f"{op}:{count}" for op, count in k["tensor_core"].items())
                for loop in k["loops"]:
                    step = " ".join(f"{op}:{count}" for op, count in loop["tensor_core"].items())
                    ops += f"  step: {step} waits {loop['waits']} barriers {loop['barriers']} copies {loop['copies']}"
                lines.append(
                    f"{chip}  {label:28} {k['name'][:32]:32} {k['registers']:4} registers {k['spilled']:4} spilled "
                    f"{k['shared']!s:>7} shared {k['async_loads']:3} async loads  {ops}"
                )
    return "\n".join(lines)


def write(path: Path, resources: dict[str, dict[str, list[dict]]]) -> None:
    """Puts the resources into a JSON file beside those of other toolchains; one line per kernel."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept[toolchain()] = resources
    path.write_text(_lines(kept, depth=3) + "\n")


def _lines(value: Any, depth: int, indent: str = "") -> str:
    """JSON with dictionaries of up to `depth` levels and the lists below them over several lines."""
    deeper = indent + " "
    if isinstance(value, dict) and depth:
        inner = [f"{json.dumps(key)}: {_lines(each, depth - 1, deeper)}" for key, each in value.items()]
        return "{\n" + ",\n".join(deeper + line for line in inner) + f"\n{indent}}}"
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(deeper + json.dumps(each) for each in value) + f"\n{indent}]"
    return json.dumps(value)


def main() -> None:
    """Prints the table, and writes it as JSON with --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", help="put the resources into this JSON file")
    parser.add_argument("--child", choices=[*CHIPS, *BLACKWELL], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(_compile_cases((CHIPS | BLACKWELL)[args.child], json.load(sys.stdin))))
        return
    if reason := missing():
        parser.exit(2, reason + "\n")
    resources = {chip.name: run(chip) for chip in CHIPS.values()}
    print(table(resources))
    if args.out:
        write(Path(args.out), resources)


if __name__ == "__main__":
    main()
