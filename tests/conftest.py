"""Eight CPU devices and repeatable hypothesis runs, set before anything imports jax."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import hypothesis

hypothesis.settings.register_profile("ringmoe", deadline=None, derandomize=True, max_examples=25, print_blob=False)
hypothesis.settings.load_profile("ringmoe")
