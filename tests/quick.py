"""Fake CPU devices and quick compiles, to be asked for before jax is first imported; child processes inherit both."""

import os

# Programs that run for milliseconds: XLA compiles them in half the time without LLVM's passes and its own fusion emitters.
FLAGS = "--xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


def fake_devices(number: int) -> None:
    """This many CPU devices."""
    before = os.environ.get("XLA_FLAGS", "")
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{before} {FLAGS} --xla_force_host_platform_device_count={number}"}
