"""The GPUs that tiles are chosen for: what limits a tile on each, and which of them a program is traced for."""

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Chip:
    """What limits a tile on a GPU.

    Attributes:
      name: of the architecture, such as "sm_90".
      device_kind: a GPU of that architecture, as JAX names it.
      shared_bytes: shared memory that one block may use.
      cores: multiprocessors.
      registers: 32-bit registers of a multiprocessor.
      mosaic: whether `int8_matmul_mixed` has a Mosaic kernel for it.
    """

    name: str
    device_kind: str
    shared_bytes: int
    cores: int
    registers: int = 65536
    mosaic: bool = False


# Source: CUDA C++ Programming Guide, technical specifications per compute capability. `cores` is that of the
# named GPU; others of the architecture have other numbers (H100 PCIe 114, H20 78), which costs time but no correctness.
CHIPS = {
    "sm_80": Chip("sm_80", "NVIDIA A100-SXM4-80GB", 166912, 108),
    "sm_89": Chip("sm_89", "NVIDIA GeForce RTX 4090", 101376, 128),
    "sm_90": Chip("sm_90", "NVIDIA H100 80GB HBM3", 232448, 132, mosaic=True),
}

# The chip with the least shared memory: its tiles fit all of them.
SAFE_CHIP = CHIPS["sm_89"]

# Product names, for devices of which only the name is known (`jax.export` for a machine that isn't here).
_CHIP_OF_PRODUCT = {
    "A100": "sm_80",
    "A30": "sm_80",
    "A800": "sm_80",
    "H100": "sm_90",
    "H200": "sm_90",
    "H800": "sm_90",
    "H20": "sm_90",
    "GH200": "sm_90",
}


def chip_for(*, capability: tuple[int, int] | None = None, device_kind: str = "") -> Chip:
    """The entry of `CHIPS` whose tiles suit a device.

    Args:
      capability: compute capability; decides where it's known.
      device_kind: the device's name otherwise, such as "NVIDIA H200".

    Returns:
      A `Chip`; `SAFE_CHIP` for GPUs with about 100 KB of shared memory (8.6, 8.9, 12.x), for unknown names, and for
      GPUs before 8.0, on which Triton kernels don't compile at all. Only 9.0 gets one with `mosaic`.

    Examples:
      >>> chip_for(capability=(8, 6)).name, chip_for(device_kind="NVIDIA H100 80GB HBM3").name
      ('sm_89', 'sm_90')
    """
    if capability == (9, 0):  # and not 9.x: wgmma's code runs on exactly this architecture
        return CHIPS["sm_90"]
    if capability is not None:
        # 8.0, 8.7, 10.x and 11.x let a block use at least as much shared memory as sm_80; others have about 100 KB.
        return CHIPS["sm_80"] if capability in ((8, 0), (8, 7)) or capability[0] in (10, 11) else SAFE_CHIP
    # Whole words, because "H20" is the beginning of "H200".
    words = device_kind.replace("-", " ").split()
    return next((CHIPS[chip] for product, chip in _CHIP_OF_PRODUCT.items() if product in words), SAFE_CHIP)


def current_chip() -> Chip:
    """The chip that a program is being traced for.

    That of the abstract device where one is set (`jax.sharding.use_abstract_mesh`, as for an export), else that of the
    default device, else `SAFE_CHIP`.
    """
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is not None and abstract.platform == "gpu":
        return chip_for(device_kind=abstract.device_kind)
    device = getattr(jax.config, "jax_default_device", None)
    if not isinstance(device, jax.Device):  # it may also be None, or a platform's name
        device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    if device.platform != "gpu" or not capability:
        return SAFE_CHIP
    major, _, minor = capability.partition(".")
    return chip_for(capability=(int(major), int(minor or 0)))
