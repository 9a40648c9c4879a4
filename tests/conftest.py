"""Eight CPU devices, patient collectives and repeatable hypothesis runs, set before anything imports jax."""

import gc
import os
import pathlib

# Eight devices on a few busy cores: a collective waits long for its last device, which is no dead lock.
# A program here runs for milliseconds and LLVM would optimise it for seconds; XLA's own passes are all there.
FLAGS = (
    "--xla_backend_optimization_level=0",
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=300",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    "--xla_cpu_collective_timeout_seconds=600",
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu compiles here, no TPU is looked for
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # one libtpu per test process
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # nor is a GPU, whichever test starts JAX
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *FLAGS)).strip()

import hypothesis  # noqa: E402
import pytest  # noqa: E402

# What imports and JAX's caches hold stays: to look through all of it again and again took a tenth of the time.
gc.set_threshold(50_000, 20, 100)

hypothesis.settings.register_profile("ringmoe", deadline=None, derandomize=True, max_examples=25, print_blob=False)
hypothesis.settings.load_profile("ringmoe")


def pytest_collection_finish():
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def few_mappings():
    """Each compiled program has mappings of memory, of which Linux gives a process 65,530; then LLVM crashes."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture
def races(capfd):
    """Interprets TPU kernels on two simulated cores and fails on a data race (newer JAX raises, older prints); what nobody
    wrote is NaN."""
    from jax.experimental.pallas import tpu as pltpu

    how = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, uninitialized_memory="nan")
    with pltpu.force_tpu_interpret_mode(how):
        yield
    assert "RACE DETECTED" not in capfd.readouterr().out
