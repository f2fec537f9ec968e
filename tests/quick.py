"""Fake CPU devices and quick compiles, to be asked for before jax is first imported; child processes inherit both."""

import os
from importlib.metadata import version

# Programs that run for milliseconds: XLA compiles them in half the time without LLVM's passes and its own fusion emitters.
# XLA ends a process that names a flag it does not know: jaxlib 0.12 has no fusion emitters to switch off.
_JAXLIB = tuple(map(int, version("jaxlib").split(".")[:2]))
FLAGS = "--xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0" + (
    " --xla_cpu_use_fusion_emitters=false" if _JAXLIB < (0, 11) else ""
)


def fake_devices(number: int) -> None:
    """This many CPU devices."""
    before = os.environ.get("XLA_FLAGS", "")
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{before} {FLAGS} --xla_force_host_platform_device_count={number}"}
