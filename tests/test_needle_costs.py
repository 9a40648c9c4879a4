"""What large configurations cost: the layers are the model's, every program is partitioned, rows add up."""

import dataclasses
import io
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import ringmoe

pytest.importorskip("optax")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("matplotlib")

from rich.console import Console

from ringmoe.needle import command, costs, data, machines, model, prices
from tests.test_needle import TINY as SMALL

TINY = dataclasses.replace(SMALL, num_heads=4, window=7)
LENGTH = 512


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 4), costs.AXES, axis_types=(AxisType.Auto,) * 2)


def test_a_layer_keeps_bfloat16():
    params = model.init(jax.random.key(0), TINY)
    x = model.embed(params, data.batch(data.Lesson(1, 128, 48), 0).tokens).astype(jnp.bfloat16)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params["local"][0])
    assert jax.eval_shape(lambda: model.local_layer(low, x, model.windowed(TINY), TINY)[0]).dtype == jnp.bfloat16


def test_a_step_is_forward_backward_and_adam():
    layer = lambda w, x, more: jnp.tanh(x @ w) + more
    w, x, more, dy = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(4, 4), (3, 4), (3, 4), (3, 4)]))
    half = lambda w: w.astype(jnp.bfloat16)
    expected, pull = jax.vjp(lambda w, x: layer(half(w), x, more), w, x)
    dw, dx = pull(dy)
    y, (after, _), grads = costs._step(layer)((w + 0, costs.ADAM.init(w)), x, (more,), dy)
    np.testing.assert_allclose(y, expected, atol=1e-6)
    np.testing.assert_allclose(grads[0], dx, atol=1e-6)
    np.testing.assert_allclose(grads[1], dy, atol=1e-6)
    np.testing.assert_allclose(after - w, -1e-4 * np.sign(dw), atol=1e-6)  # Adam's first step


@pytest.mark.parametrize("make", [costs.training, costs.prefill, costs.decode])
def test_programs_are_partitioned(make, mesh, monkeypatch):
    monkeypatch.setattr(costs, "CONTEXT", LENGTH)
    monkeypatch.setattr(costs, "CHUNK", 128)
    programs = make(TINY, mesh, LENGTH)
    for name, program in programs.items():
        assert not program.runs or program.function.lower(*program.arguments) is not None, name
    assert programs["local"].flops > 0


def test_what_is_kept_is_all_weights_the_cache_and_what_training_saves(mesh, monkeypatch):
    monkeypatch.setattr(costs, "CONTEXT", LENGTH)
    config = dataclasses.replace(TINY, num_local=3, num_global=2)
    alone = jax.make_mesh((1, 1), costs.AXES, axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])
    weights, met = costs.num_weights(config)
    assert 0 < met < weights
    ends = 2 * (16 + model.SYMBOLS * 16)  # counted with each global layer
    cache = 2 * LENGTH * TINY.global_head_dim * 2
    assert costs.resident(costs.prefill(config, alone, LENGTH)) == 2 * weights + ends + cache
    saved = 5 * LENGTH * 16 * 2 + LENGTH * (2 * 4 + model.SIGNAL * 2)
    assert costs.resident(costs.training(config, alone, LENGTH)) == 12 * weights + 6 * ends + saved + 6 * 4
    assert costs.resident(costs.training(config, mesh, LENGTH)) < costs.resident(costs.training(config, alone, LENGTH))


def test_a_context_is_read_in_chunks_with_halos():
    halo = prices.SIZES["Pro"].halo
    assert costs.num_chunks(prices.SIZES["Pro"], costs.CHUNK) == 1
    assert costs.num_chunks(prices.SIZES["Pro"], costs.CHUNK + 1) == 2
    assert costs.num_chunks(prices.SIZES["Pro"], 2 * costs.CHUNK - halo + 1) == 3


def report(us: float, peak: int, hbm: int = 1000, flops: float = 100.0) -> Any:
    return types.SimpleNamespace(
        flops=flops,
        us=us,
        exposed_us=us / 4,
        peak_bytes=peak,
        hbm_bytes=hbm,
        peak_flops=1e6,
        num_devices=2,
        compile_seconds=1.0,
    )


def summed(local, far) -> prices.Cost:
    held = jax.ShapeDtypeStruct((10,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    programs = {
        "local": costs.Program(len, (), 3, 2, held, (), 7.0),
        "global": costs.Program(len, (), 2, 1, held, held, 11.0),
    }
    return prices.summed("Pro", "reading", "v5e:2x4", programs, {"local": local, "global": far})


def test_rows_add_up():
    row = summed(report(10.0, 100), report(100.0, 400))
    assert row.us == 3 * 2 * 10 + 2 * 100
    assert row.exposed_us == row.us / 4
    assert row.memory == 5 * 40 + (400 - 80)
    assert row.utilisation == pytest.approx((6 * 7 + 2 * 11) / (1e6 * 2 * row.us * 1e-6))
    assert row.fits


def test_what_does_not_fit_has_no_time():
    wide = summed(report(10.0, 100), report(100.0, 981))
    assert wide.us is None and not wide.fits
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(prices.table([wide, summed(report(10.0, 100), report(100.0, 400))]))
    text = console.export_text()
    assert "does not fit" in text and "260 us" in text and "25%" in text


def test_a_time_without_all_useful_work_is_a_lower_bound():
    row = summed(report(10.0, 100, flops=3.4), report(100.0, 400))
    assert row.us == 260 and row.utilisation is None
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(prices.table([row]))
    assert ">= 260 us" in console.export_text()


def test_nothing_is_compiled_that_cannot_fit(monkeypatch):
    monkeypatch.setattr(ringmoe, "inspect", lambda *a, **k: pytest.fail("compiled"))
    row = prices.measure("Pro", "a training step of 10,485,760 tokens", "v5e:16x16")
    assert not row.fits and row.compile_seconds == 0 and row.us is None
    assert row.memory > 25 * 2**30


def test_retrieval_is_its_formula():
    machine = ringmoe.target("v5e:2x4")
    rate, bandwidth = 0.4 * machine.matmul_flops["bf16"], machine.hbm_bandwidth
    found = prices.retrieve(TINY, "v5e:2x4", 2**20)
    assert found.index_us == pytest.approx(1e6 * 2.2e8 * 2**20 / rate / 8)
    assert found.index_bytes == 2048 * 1024 * 2
    assert found.lookup_us == pytest.approx(1e6 * (2.2e8 / bandwidth + found.index_bytes / bandwidth / 8))
    assert prices.retrieve(TINY, "v5e:2x4", 2**20, found=32).read_us >= found.read_us
    assert len(prices.retrieval_table().rows) == len(prices.SIZES) * len(prices.TARGETS)


def test_the_part_keeps_each_row_and_goes_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command.placement, "use_cpu_devices", lambda: None)
    monkeypatch.setattr(prices, "TARGETS", ("v5e:2x4",))
    asked = []

    def measure(size, work, target):
        asked.append((size, work, target))
        return prices.Cost(size, work, target, 1, 2, 17.1e6, 1e6, 0.5, 3.0)

    monkeypatch.setattr(prices, "measure", measure)
    words = ["--quick", "--parts", "costs", "--devices", "1", "--out", str(tmp_path)]
    for _ in range(2):
        assert command.main(words) == 0
        assert "17.1 s" in capsys.readouterr().out
    assert len(asked) == len(set(asked)) == 2 * len(prices.WORK)


@pytest.mark.parametrize(("us", "said"), [(70.4, "70 us"), (3210.0, "3.2 ms"), (17.1e6, "17.1 s")])
def test_times_are_readable(us, said):
    assert machines.seconds(us) == said


def test_targets_train_on_as_many_tokens_as_they_read():
    one = jax.make_mesh((8,), ("seq",), axis_types=(AxisType.Auto,))
    programs = machines.programs(TINY, one, 1024, 256)
    _, (_, example), _ = programs["a training step of 1,024 tokens"]
    assert example.shown.shape == (1, 1024)
    assert programs["a byte of 32 answers"][1][1].keys.shape[1] == 1024
