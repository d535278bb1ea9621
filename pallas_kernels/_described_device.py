"""A GPU that isn't there, described well enough for JAX to lower and compile for it.

`jax.experimental.topologies` and XLA's text format for devices aren't stable interfaces. They are the only way to
compile for a GPU without one, and used here only. Checked on JAX 0.10.2, 0.11.2 and 0.12.0.1.
"""

import jax
from jax.experimental import topologies

from pallas_kernels.chips import Chip

# A GpuTargetConfig of XLA in protobuf's text format. Bandwidth, clock rate and cache sizes are plausible values for a
# cost model that this check doesn't look at.
_DEVICE = """gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
 shared_memory_per_core: {per_core} shared_memory_per_block_optin: {optin} threads_per_core_limit: {threads}
 core_count: {cores} fpus_per_core: 64 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
 memory_bandwidth: 2000000000000 l2_cache_size: 41943040 clock_rate_ghz: 1.5 device_memory_size: 80000000000
 registers_per_core_limit: {registers} registers_per_block_limit: {registers} thread_dim_limit_x: 1024
 thread_dim_limit_y: 1024 thread_dim_limit_z: 64 runtime_version: "13.0.0" driver_version: "13.0.0"
 compile_time_toolkit_version: "13.0.0" dnn_version: "9.12.0" cuda_compute_capability {{ {capability} }} }}
 platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }} device_description_str: "{name}" """


def device_for(chip: Chip) -> jax.Device:
    """A JAX device to lower and compile for, made from its description."""
    major, minor = chip.architecture
    capability = f"major: {major}" + (f" minor: {minor}" if minor else "")
    if chip.mosaic:  # the "a" of sm_90a, without which there is no wgmma
        capability += " feature_extension: ACCELERATED_FEATURES"
    target = _DEVICE.format(
        per_core=chip.shared_bytes + 1024,
        optin=chip.shared_bytes,
        threads=chip.threads,
        cores=chip.cores,
        registers=chip.registers,
        capability=capability,
        name=chip.device_kind,
    )
    return topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=target).devices[0]
