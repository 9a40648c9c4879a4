"""What does not fit a device, by real compilers and by what they write."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from ringmoe import inspector
from ringmoe.inspector import machines, memory, reader
from tests import inspector_programs as programs

ONE = {"devices": 1}


def alone(*shape):
    return programs.spec(shape, jnp.bfloat16, ONE)


def lowered(function, x, target):
    mesh = machines.target(target).mesh()
    placed = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, jax.P()))
    return jax.jit(function).lower(placed), mesh


def chain(a):
    for _ in range(3):
        a = jnp.tanh(a @ a)
    return a


def test_a_program_too_large_for_a_tpu_is_reported_all_the_same():
    report = inspector.inspect(chain, alone(53248, 53248), target="v5e:1x1")  # three matrices of 5.28 GiB, 15.75 there
    each = 53248 * 53248 * 2
    assert report.fits is False and report.peak_bytes == report.oversize.needed_bytes == 3 * each
    assert report.oversize.available_bytes == 15.75 * 2**30
    assert report.oversize.excess_bytes == 3 * each - 15.75 * 2**30
    assert [(b.bytes, b.shape) for b in report.oversize.buffers] == [(each, "bf16[53248,53248]")] * 3
    assert any("dot_general" in b.op_name for b in report.oversize.buffers)
    assert report.us == pytest.approx(3 * 2 * 53248**3 / 197e12 * 1e6, rel=0.1)  # the schedule is there, and timed
    text = str(report)
    assert (
        f"DOES NOT FIT, {report.oversize.excess_bytes / 2**20:.3g} MiB too much" in text and "alive at the peak" in text
    )
    assert report.to_dict()["oversize"]["buffers"][0]["bytes"] == each and report.compile_seconds > 0


def test_a_program_too_large_for_a_gpu_compiles_and_does_not_fit():
    report = inspector.inspect(chain, alone(250_000, 250_000), target="h200")
    each = 250_000 * 250_000 * 2
    assert report.fits is False and report.peak_bytes >= 3 * each and report.oversize.buffers[0].bytes >= each
    assert report.oversize.available_bytes == report.hbm_bytes and "DOES NOT FIT" in str(report)


def test_the_peak_decides_not_the_sum_of_the_parts():
    """A step of SGD whose parts exceed v5e's 15.75 GiB, and whose peak does not."""

    def step(weights, x):
        loss = lambda w: jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0].astype(jnp.float32) ** 2)
        return weights - 0.01 * jax.grad(loss)(weights)

    donated = jax.jit(step, donate_argnums=0)
    report = inspector.inspect(donated, alone(12, 2048, 2048), alone(151_000, 2048), target="v5e:1x1")
    assert report.fits and report.oversize is None
    assert report.peak_bytes < 15.75 * 2**30 < sum(report.memory.values())


def test_what_a_tpu_compiler_takes_fits():
    """v5p has 95 GiB by its documentation, and 95.7 by its compiler."""
    report = inspector.inspect(lambda a: a[0], alone(49_900_000, 1024), target="v5p:1x1x1")
    assert report.fits and report.peak_bytes > report.hbm_bytes


def test_a_lowered_program_too_large_says_it_needs_its_target():
    low, mesh = lowered(chain, alone(53248, 53248), "v5e:1x1")
    with pytest.raises(ValueError, match=r"does not fit its devices' memory.*pass target="):
        inspector.inspect(low)
    report = inspector.inspect(low, target="v5e:1x1", mesh=mesh)
    assert report.fits is False and report.mesh == ONE


def test_a_compiled_program_too_large_has_no_list():
    low, _ = lowered(lambda a: a + 1, alone(2**34), "cpu")
    report = inspector.inspect(low.compile(), target="cpu")
    assert report.fits is False and report.oversize.buffers == () and report.oversize.excess_bytes > 2**35


class Lowered:
    """Stands for a program that its compiler gives up, with or without a dump."""

    def __init__(self, message, dumps):
        self.message, self.dumps = message, dumps

    def as_text(self):
        return "module"

    def compile(self, compiler_options=None):
        if compiler_options and self.dumps:
            dumped(pathlib.Path(compiler_options["xla_dump_to"]), "t", "Total bytes: 5")
        raise jax.errors.JaxRuntimeError(self.message)


@pytest.mark.parametrize(
    ("message", "dumps"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem", True),
        ("INTERNAL: something about HBM", True),
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM", False),
    ],
)
def test_other_failures_are_raised_as_they_are(message, dumps):
    with pytest.raises(jax.errors.JaxRuntimeError) as info:
        inspector.inspect(Lowered(message, dumps), target="v5e:1x1")
    assert str(info.value) == message


@pytest.mark.parametrize(
    ("message", "size"),
    [
        ("total memory required for HLO temporaries (15.84G) exceeds available HBM (15.75G).", 15.75 * 2**30),
        ("Ran out of memory in memory space hbm. Used 30.52G of 512.00M hbm. Exceeded hbm capacity by 14.8G", 2**29),
        ("RESOURCE_EXHAUSTED", None),
    ],
)
def test_what_there_is_by_the_compilers_message(message, size):
    assert memory.available(ValueError(message)) == size


MODULE = """HloModule t, is_scheduled=true

ENTRY %e (a: f32[8]) -> f32[8] {
  %a = f32[8] parameter(0), metadata={op_name="x"}
  %pair = (f32[8], bf16[4,2]) custom-call(%a), custom_call_target="f"
  ROOT %r = f32[8] get-tuple-element(%pair), index=0
}
"""


def dumped(folder, name, total, peak=""):
    start = f"{name}.after_optimizations"
    (folder / f"{start}.txt").write_text(MODULE)
    (folder / f"{start}-memory-usage-report.txt").write_text(f"Memory Space: default (color=0)\n{total}\n")
    (folder / f"{start}-live-range.txt").write_text(peak)


def test_dumps_are_read(tmp_path):
    peak = (
        "HloLiveRange (max 4):\n  Live ranges at 3 (peak):\n"
        "    a{}: 32 bytes (cumulative: 32 bytes)\n    pair{1}: 99 bytes (cumulative: 131 bytes)\n"
        "    pair{}: 16 bytes (x)\n    gone{7}: 8 bytes\n  Stack trace\n    later{}: 7 bytes\n"
    )
    for name, total, listed in (("1", 5, ""), ("2", 155, peak), ("3", 7, "")):
        dumped(tmp_path, name, f"Total bytes: {total} (so much)", listed)
    dumped(tmp_path, "odd", "nothing")
    found = memory.read_dump(tmp_path)
    assert found is not None and found.text == MODULE and found.peak_bytes == 155
    oversize = found.oversize(reader.parse(found.text), 100)
    assert oversize.excess_bytes == 55 and [(b.bytes, b.name, b.shape, b.op_name) for b in oversize.buffers] == [
        (99, "pair", "bf16[4,2]", ""),
        (32, "a", "f32[8]", "x"),
        (16, "pair", "tuple", ""),
        (8, "gone", "", ""),
    ]
    assert found.oversize(reader.parse(found.text), 200).excess_bytes == 0  # the message's figure is rounded


def test_no_dump_is_none(tmp_path):
    assert memory.read_dump(tmp_path) is None
    dumped(tmp_path, "odd", "nothing")
    assert memory.read_dump(tmp_path) is None
