"""Time the trace, lowering and compilation of a train step as layers and devices grow, and count them.

python -m tests.measure.compile_time
"""

from __future__ import annotations

import os
import time
from collections import defaultdict

os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=64"}

import jax  # noqa: E402

from jaxtrain.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig  # noqa: E402
from jaxtrain.mesh import make_mesh  # noqa: E402
from jaxtrain.train.optimizer import optimizer_of  # noqa: E402
from jaxtrain.train.step import compile_train_step  # noqa: E402


def main() -> None:
    """Print a line for each number of layers and devices; the first is there to warm up."""
    events: defaultdict[str, list[float]] = defaultdict(list)

    def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if str(kwargs.get("fun_name")) in ("train_step", "jit(train_step)"):
            events[event.rpartition("/")[2]].append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(note)
    for layers, devices in ((2, 1), (2, 1), (8, 1), (32, 1), (8, 8), (8, 64), (32, 64)):
        model = ModelConfig(layers, 256, 4, 4, 64, 512, 2048, dtype="float32")
        train = TrainConfig(global_batch_size=devices)
        config = Config(model=model, mesh=MeshConfig(fsdp=devices), data=DataConfig(sequence_length=128), train=train)
        events.clear()
        began = time.perf_counter()
        compile_train_step(config, make_mesh(config.mesh, jax.devices()[:devices]), optimizer_of(config), "reference")
        parts = ", ".join(f"{name} {len(each)} x {sum(each):.2f} s" for name, each in events.items())
        print(f"{layers} layers, {devices} devices: {time.perf_counter() - began:.1f} s; {parts}", flush=True)


if __name__ == "__main__":
    main()
