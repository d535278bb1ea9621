"""The GPUs that tiles are chosen for: what limits a tile on each, and which of them a program is traced for."""

import dataclasses
from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Chip:
    """What limits a tile on a GPU, and which GPUs take its tiles.

    Attributes:
      name: of the architecture, such as "sm_90".
      device_kind: a GPU of that architecture, as JAX names it.
      products: marketing names of GPUs that take its tiles, the one that `device_kind` names first.
      capabilities: compute capabilities of such GPUs; a minor version of None stands for all.
      shared_bytes: shared memory that one block may use.
      cores: multiprocessors, of the device that `device_kind` names; others of the architecture have other numbers.
      threads: that a multiprocessor holds at once.
      registers: 32-bit registers of a multiprocessor.
      mosaic: whether `int8_matmul_mixed` has a Mosaic kernel for it.
    """

    name: str
    device_kind: str
    products: tuple[str, ...]
    capabilities: tuple[tuple[int, int | None], ...]
    shared_bytes: int
    cores: int
    threads: int = 2048
    registers: int = 65536
    mosaic: bool = False

    @property
    def architecture(self) -> tuple[int, int]:
        """The compute capability that its kernels are compiled for when no GPU is there: (8, 9) of "sm_89"."""
        digits = self.name.removeprefix("sm_")
        return int(digits[:-1]), int(digits[-1])


# Source: CUDA C++ Programming Guide, technical specifications per compute capability.
CHIPS = {
    chip.name: chip
    for chip in (
        # GPUs of 10.x and 11.x let a block use at least as much shared memory.
        Chip(
            name="sm_80",
            device_kind="NVIDIA A100-SXM4-80GB",
            products=("A100", "A30", "A800"),
            capabilities=((8, 0), (8, 7), (10, None), (11, None)),
            shared_bytes=166912,
            cores=108,
        ),
        Chip(
            name="sm_89",
            device_kind="NVIDIA GeForce RTX 4090",
            products=("RTX 4090",),
            capabilities=((8, 6), (8, 9), (12, None)),
            shared_bytes=101376,
            cores=128,
            threads=1536,
        ),
        # Of 9.x only 9.0: the code of wgmma runs on exactly this architecture.
        Chip(
            name="sm_90",
            device_kind="NVIDIA H100 80GB HBM3",
            products=("H100", "H200", "H800", "H20", "GH200"),
            capabilities=((9, 0),),
            shared_bytes=232448,
            cores=132,
            mosaic=True,
        ),
    )
}

# The chip with the least shared memory: its tiles fit all of them.
SAFE_CHIP = min(CHIPS.values(), key=lambda chip: chip.shared_bytes)

# Pallas's Triton backend compiles from this compute capability on; before it are T4 (7.5) and V100 (7.0).
LEAST_CAPABILITY = (8, 0)


def products() -> dict[str, Chip]:
    """The chip of each GPU that is known by its marketing name, such as "H200"."""
    return {product: chip for chip in CHIPS.values() for product in chip.products}


def chip_for(*, capability: tuple[int, int] | None = None, device_kind: str = "") -> Chip:
    """The entry of `CHIPS` whose tiles suit a device.

    Args:
      capability: compute capability; decides where it's known.
      device_kind: the device's name otherwise, such as "NVIDIA H200".

    Returns:
      A `Chip`; `SAFE_CHIP` for GPUs that none names, and for those before 8.0, on which Triton kernels don't compile at
      all.

    Examples:
      >>> chip_for(capability=(8, 6)).name, chip_for(device_kind="NVIDIA H100 80GB HBM3").name
      ('sm_89', 'sm_90')
    """
    if capability is not None:
        known = (capability, (capability[0], None))
        return next((chip for chip in CHIPS.values() if set(known) & set(chip.capabilities)), SAFE_CHIP)
    # Whole words, because "H20" is the beginning of "H200".
    words = f" {device_kind.replace('-', ' ')} "
    return next((chip for product, chip in products().items() if f" {product} " in words), SAFE_CHIP)


def current_capability() -> tuple[int, int] | None:
    """The compute capability of the device that a program is being traced for, such as (7, 5) of a T4.

    None where the device isn't a GPU, or where an abstract device is set, which has a name only.
    """
    if _abstract_gpu() is not None:
        return None
    device = _default_device()
    capability = str(getattr(device, "compute_capability", ""))
    if device.platform != "gpu" or not capability:
        return None
    major, _, minor = capability.partition(".")
    return int(major), int(minor or 0)


def current_chip() -> Chip:
    """The chip that a program is being traced for, with as many multiprocessors as the device has.

    That of the abstract device where one is set (`jax.sharding.use_abstract_mesh`, as for an export), else that of the
    default device, else `SAFE_CHIP`. H100 PCIe, for example, has 114 multiprocessors, H20 has 78.
    """
    abstract = _abstract_gpu()
    chip = chip_for(capability=current_capability(), device_kind="" if abstract is None else abstract.device_kind)
    cores = getattr(_default_device(), "core_count", None) if abstract is None else abstract.num_cores
    return dataclasses.replace(chip, cores=cores) if cores else chip


def _default_device() -> jax.Device:
    device = getattr(jax.config, "jax_default_device", None)
    return device if isinstance(device, jax.Device) else jax.devices()[0]  # it may also be None, or a platform's name


def _abstract_gpu() -> jax.sharding.AbstractDevice | None:
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return abstract if abstract is not None and abstract.platform == "gpu" else None
