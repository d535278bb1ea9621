"""Compiles the kernels to machine code on a machine without a GPU and reads what they use.

`python -m pallas_kernels.nogpu` prints a table: registers, spilled bytes, shared memory and tensor-core instructions
for every default config and chip. It needs the packages of the extra `nogpu` in exactly jax's version (README.md beside
this file).

The CUDA plugin compiles for a described device as well as for a present one. XLA dumps the PTX of each kernel, ptxas
reports the resources, nvdisasm the instructions. The dump is configured by environment variables that must be set
before JAX starts, and Mosaic reads the chip once per process: so each chip gets a process of its own.
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

import jax
import jax.numpy as jnp

from pallas_kernels.chips import CHIPS, Chip
from pallas_kernels.configs import Config, default_configs, from_json, to_json
from pallas_kernels.matmul import llm_int8_matmul

_DUMP = "PALLAS_KERNELS_NOGPU_DUMP"
_PACKAGES = ("jax-cuda13-plugin", "jax-cuda13-pjrt")

# Compute capability and threads per multiprocessor, as XLA's text format for devices wants them.
_CAPABILITY = {
    "sm_80": ("major: 8", 2048),
    "sm_89": ("major: 8 minor: 9", 1536),
    "sm_90": ("major: 9 feature_extension: ACCELERATED_FEATURES", 2048),
}
_DEVICE = """gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
 shared_memory_per_core: {per_core} shared_memory_per_block_optin: {optin} threads_per_core_limit: {threads}
 core_count: {cores} fpus_per_core: 64 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
 memory_bandwidth: 2000000000000 l2_cache_size: 41943040 clock_rate_ghz: 1.5 device_memory_size: 80000000000
 registers_per_core_limit: {registers} registers_per_block_limit: {registers} thread_dim_limit_x: 1024
 thread_dim_limit_y: 1024 thread_dim_limit_z: 64 runtime_version: "13.0.0" driver_version: "13.0.0"
 compile_time_toolkit_version: "13.0.0" dnn_version: "9.12.0" cuda_compute_capability {{ {capability} }} }}
 platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }} device_description_str: "{name}" """

_OURS = ("_kernel",)  # Triton kernels are named after their functions, all of which end so
_TENSOR_CORE = re.compile(r"\b(IGMMA|HGMMA|IMMA|HMMA)\b")


@dataclass(frozen=True)
class Kernel:
    """What ptxas and nvdisasm say about one kernel, and XLA about its shared memory (None: Mosaic launches it)."""

    name: str
    registers: int
    spilled: int
    shared: int | None
    tensor_core: dict[str, int]
    async_loads: int


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
    """The versions that decide what comes out: of JAX and of the assembler."""
    return f"jax {jax.__version__}, nvidia-cuda-nvcc {importlib.metadata.version('nvidia-cuda-nvcc')}"


def _find_tool(name: str) -> str | None:
    found = (hit for path in sys.path for hit in glob.glob(f"{path}/nvidia/*/bin/{name}"))
    return next(found, None) or shutil.which(name)


def _tool(name: str, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run([str(_find_tool(name)), *args], capture_output=True, text=True, check=True)


def device_for(chip: Chip):
    """A JAX device to lower and compile for, that isn't there."""
    from jax.experimental import topologies

    capability, threads = _CAPABILITY[chip.name]
    target = _DEVICE.format(
        per_core=chip.shared_bytes + 1024,
        optin=chip.shared_bytes,
        threads=threads,
        cores=chip.cores,
        registers=chip.registers,
        capability=capability,
        name=chip.device_kind,
    )
    return topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=target).devices[0]


def compile_kernels(fn: Callable, chip: Chip, *avals: jax.ShapeDtypeStruct) -> list[Kernel]:
    """Compiles a function for a chip and disassembles the package's kernels; only in a process that `run` started."""
    dump = Path(os.environ[_DUMP])
    for file in dump.iterdir():
        file.unlink()
    device = device_for(chip)
    sharding = jax.sharding.SingleDeviceSharding(device)
    with jax.default_device(device):  # both lowerings read the architecture from it
        args = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in avals]
        jax.jit(fn).lower(*args).compile()
    launches = "".join(file.read_text() for file in dump.glob("*.thunk_sequence.txt"))
    shared = {name: int(size) for name, size in re.findall(r"(\w+) grid:.*shared_memory: (\d+) bytes", launches)}
    kernels = []
    for file in sorted(dump.glob("*.ptx")):
        ptx = file.read_text()
        entry, target = re.search(r"\.entry (\w+)", ptx), re.search(r"\.target (\w+)", ptx)
        if entry and target and entry[1].endswith(_OURS):  # not XLA's own
            kernels.append(_assemble(file, entry[1], target[1], shared.get(entry[1])))
    return sorted(kernels, key=lambda kernel: kernel.name)


def _assemble(ptx: Path, name: str, target: str, shared: int | None) -> Kernel:
    cubin = f"{ptx}.cubin"
    report = _tool("ptxas", f"-arch={target}", "-v", str(ptx), "-o", cubin).stderr
    code = _tool("nvdisasm", "-c", cubin).stdout
    registers = re.search(r"Used (\d+) registers", report)
    assert registers is not None, report
    return Kernel(
        name=name,
        registers=int(registers[1]),
        spilled=sum(int(size) for size in re.findall(r"(\d+) bytes spill (?:stores|loads)", report)),
        shared=shared,
        tensor_core=dict(sorted(collections.Counter(_TENSOR_CORE.findall(code)).items())),
        async_loads=len(re.findall(r"\b(?:LDGSTS|UTMALDG)\b", code)),
    )


def cases(chip: Chip) -> dict[str, tuple[Config, tuple[int, int, int], float]]:
    """What the check compiles for a chip: label -> (config, (m, n, k), threshold).

    Every default config at shapes that its tiles divide, with and without outliers, and the first of a kind at odd
    shapes too.
    """
    found: dict[str, tuple[Config, tuple[int, int, int], float]] = {}
    configs: dict[Config, str] = {}
    for (name, shape), config in default_configs().items():
        if name == chip.name:
            configs.setdefault(config, shape)
    for config, shape in configs.items():
        if shape == "few":
            found[f"{shape} rows=16"] = config, (16, 4096, 4096), 6.0
            found[f"{shape} rows=1"] = config, (1, 4096, 4096), 6.0
            found[f"{shape} rows=1 threshold=0"] = config, (1, 4096, 4096), 0.0
            found[f"{shape} odd"] = config, (3, 1001, 1001), 6.0
        else:
            found[shape] = config, (2048, 4096, 4096), 6.0
            found[f"{shape} threshold=0"] = config, (2048, 4096, 4096), 0.0
            if config.kind == "triton":
                found[f"{shape} odd"] = config, (1001, 1001, 1001), 6.0
    return found


def _avals(m: int, n: int, k: int) -> list[jax.ShapeDtypeStruct]:
    f32 = jnp.float32
    shapes = ((m, k), jnp.bfloat16), ((n, k), jnp.int8), ((n,), f32), ((n,), f32)
    return [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]


def _child(chip: Chip, cases: dict) -> dict[str, list[dict]]:
    result = {}
    for label, (entry, size, threshold) in cases.items():
        config = from_json(entry)

        def fn(x, w, scale, bias, config=config, threshold=threshold):
            return llm_int8_matmul(x, w, scale, bias=bias, threshold=threshold, config=config)

        try:
            kernels = compile_kernels(fn, chip, *_avals(*size))
        except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
            print(f"{label}: {error}", file=sys.stderr)
            kernels = []
        result[label] = [asdict(kernel) for kernel in kernels]
    return result


def run(chip: Chip, chosen: dict | None = None) -> dict[str, list[dict]]:
    """Compiles cases for a chip in a process of its own.

    Args:
      chip: an entry of `CHIPS`.
      chosen: label -> (config, (m, n, k), threshold); None for `cases(chip)`.

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
            label: (to_json(config), size, threshold)
            for label, (config, size, threshold) in (cases(chip) if chosen is None else chosen).items()
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
                lines.append(
                    f"{chip}  {label:28} {k['name'][:32]:32} {k['registers']:4} registers {k['spilled']:4} spilled "
                    f"{k['shared']!s:>7} shared {k['async_loads']:3} async loads  {ops}"
                )
    return "\n".join(lines)


def write(path: Path, resources: dict[str, dict[str, list[dict]]]) -> None:
    """Puts the resources into a JSON file beside those of other toolchains; one line per kernel."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept[toolchain()] = resources
    text = json.dumps(kept, indent=1)
    path.write_text(re.sub(r"\{\s+(\"name\".*?)\n\s+\}(?=,?\n\s+[\]{])", _one_line, text, flags=re.S) + "\n")


def _one_line(match: re.Match) -> str:
    return "{" + re.sub(r"\s*\n\s*", " ", match[1]) + "}"


def main() -> None:
    """Prints the table, and writes it as JSON with --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", help="put the resources into this JSON file")
    parser.add_argument("--child", choices=list(CHIPS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(_child(CHIPS[args.child], json.load(sys.stdin))))
        return
    if reason := missing():
        parser.exit(2, reason + "\n")
    resources = {chip.name: run(chip) for chip in CHIPS.values()}
    print(table(resources))
    if args.out:
        write(Path(args.out), resources)


if __name__ == "__main__":
    main()
