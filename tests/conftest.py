"""Eight CPU devices, patient collectives and repeatable hypothesis runs, set before anything imports jax."""

import gc
import os
import pathlib
import zlib

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


def pytest_addoption(parser):
    parser.addoption(
        "--cases", choices=("all", "sample", "rest"), default="all",
        help="of tests marked `sampled`, which take long for their many cases: all cases, a sixth (and all other tests: "
        "`make test`), or the rest (alone)",
    )  # fmt: skip


def pytest_collection_modifyitems(config, items):
    """By a hash of a case's name: always the same, and no parameter's values come together with another's.

    The sample has of each test the cases of the least remainder, which is 0 where there are many: none is without a case.
    """
    wanted = config.getoption("cases")
    if wanted == "all":
        return
    test, rest, least = lambda item: item.nodeid.split("[")[0], lambda item: zlib.crc32(item.nodeid.encode()) % 6, {}
    for item in items:
        least[test(item)] = min(rest(item), least.get(test(item), 5))
    few = lambda item: rest(item) == least[test(item)] or not item.get_closest_marker("sampled")
    chosen = [item for item in items if few(item) == (wanted == "sample")]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


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


@pytest.fixture
def interpreted(monkeypatch, capfd):
    """Interprets the Hopper kernels of attention and fails on a data race (newer JAX raises, older prints). What the
    interpreter lacks is put in other words:

    It knows no accumulator that begins with a value, and no product whose left side is in registers: these are plain sums, of
    what is read from shared memory. To it a product reads as threads do and not, as on the chip, as TMA does, so it wants a
    fence before TMA may write there again, for which a barrier is enough. What blocks of threads add in turn each of them
    writes to an array of its own, and those are added afterwards.
    """
    import jax.numpy as jnp
    from jax import lax
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from ringmoe.pallas import attention_gpu, decode_gpu, gradients_gpu, streams_gpu

    class Total:
        """An accumulator that begins with a value."""

        def __init__(self, value):
            self.value = value

    def added_to(totals, work, *kept):
        accumulators = [Total(x) for x in totals]
        found = work(*accumulators, *kept)
        return (*(x.value for x in accumulators), *found)

    def wgmma(acc, a, b, of_the_chip=plgpu.wgmma):
        if not isinstance(acc, Total):
            return of_the_chip(acc, a, b)
        acc.value += jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)

    def load(acc, *, of_the_chip=plgpu.wgmma_accumulator_load, **wait):
        return acc.value if isinstance(acc, Total) else of_the_chip(acc, **wait)

    def add(blocks, total, n, row, turn):
        shares, rows, width = blocks.shape
        own = n * lax.axis_size("rows") + lax.axis_index("rows")
        for share in range(shares):
            total[own, pl.ds(row, rows), pl.ds(share * width, width)] = blocks[share]

    def launch(body, name, heads, rows, *args, of_the_chip=streams_gpu.launch, into=None, **kind):
        if into is None:
            return of_the_chip(body, name, heads, rows, *args, **kind)
        each = jnp.zeros((into.shape[0], into.shape[1] * rows, *into.shape[2:]), into.dtype)
        each, *found = of_the_chip(body, name, heads, rows, *args, **kind, into=each)
        return into + each.reshape(*into.shape[:2], rows, *into.shape[2:]).sum(2), *found

    def fenced(of_the_chip):
        def run(*args):
            plgpu.commit_smem()
            of_the_chip(*args)

        return run

    for module in (attention_gpu, decode_gpu, gradients_gpu):
        monkeypatch.setattr(module, "added_to", added_to)
        monkeypatch.setattr(module, "MOST_STAGES", 2)  # so that few steps take a slot again
    monkeypatch.setattr(plgpu, "wgmma", wgmma)
    monkeypatch.setattr(plgpu, "wgmma_accumulator_load", load)
    monkeypatch.setattr(streams_gpu, "add_in_turn", add)
    monkeypatch.setattr(gradients_gpu, "launch", launch)
    for name in ("barrier_arrive", "copy_gmem_to_smem"):
        monkeypatch.setattr(plgpu, name, fenced(getattr(plgpu, name)))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield
    assert "RACE DETECTED" not in "".join(capfd.readouterr())
