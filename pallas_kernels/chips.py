"""The chips that configs are checked against, and which of them a program is traced for."""

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Chip:
    """What limits a tile: shared memory that one block may use, registers of a multiprocessor, their number."""

    name: str
    device_kind: str
    shared_bytes: int
    cores: int
    registers: int = 65536
    mosaic: bool = False


# CUDA C++ Programming Guide, technical specifications per compute capability; cores of A100, RTX 4090, H100 SXM.
CHIPS = {
    "sm_80": Chip("sm_80", "NVIDIA A100-SXM4-80GB", 166912, 108),
    "sm_89": Chip("sm_89", "NVIDIA GeForce RTX 4090", 101376, 128),
    "sm_90": Chip("sm_90", "NVIDIA H100 80GB HBM3", 232448, 132, mosaic=True),
}

# The chip with the least shared memory: its tiles run on all of them.
SAFE_CHIP = CHIPS["sm_89"]

_KINDS = {
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
      A `Chip`; `SAFE_CHIP` for GPUs with about 100 KB of shared memory (8.6, 8.9, 12.x) and for unknown names. Only 9.0
      gets one with `mosaic`: its code is compiled for that one chip.

    Example:
      >>> chip_for(capability=(8, 6)).name, chip_for(device_kind="NVIDIA H100 80GB HBM3").name
      ('sm_89', 'sm_90')
    """
    if capability == (9, 0):
        return CHIPS["sm_90"]
    if capability is not None:
        return CHIPS["sm_80"] if capability in ((8, 0), (8, 7)) or capability[0] in (10, 11) else SAFE_CHIP
    words = device_kind.replace("-", " ").split()
    return next((CHIPS[chip] for kind, chip in _KINDS.items() if kind in words), SAFE_CHIP)


def current_chip() -> Chip:
    """The chip that is traced for: the abstract device in use, else the default device, else the safe choice."""
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is not None and abstract.platform == "gpu":
        return chip_for(device_kind=abstract.device_kind)
    device = getattr(jax.config, "jax_default_device", None)
    if not isinstance(device, jax.Device):
        device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    if device.platform != "gpu" or not capability:
        return SAFE_CHIP
    major, _, minor = capability.partition(".")
    return chip_for(capability=(int(major), int(minor or 0)))
