"""Eight fake CPU devices for every test, set before jax is first imported."""

import os

os.environ["JAX_PLATFORMS"] = os.environ.get("JAXTRAIN_TEST_PLATFORM", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
