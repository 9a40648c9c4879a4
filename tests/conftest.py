"""Eight CPU devices before jax is imported, and hypothesis without deadlines."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

from hypothesis import settings  # noqa: E402

settings.register_profile("ringmoe", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("ringmoe")
