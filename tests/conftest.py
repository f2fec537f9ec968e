"""Eight fake CPU devices for every test; with JAXTRAIN_TEST_PLATFORM=cuda real ones, for the tests marked gpu."""

import os

from tests.quick import fake_devices

platform = os.environ.get("JAXTRAIN_TEST_PLATFORM", "cpu")
if platform == "cpu":
    fake_devices(8)
else:
    os.environ["JAX_PLATFORMS"] = platform
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
