"""`python -m bench.gpu` without a GPU: its programs compile for one, and what it does with them is right on a CPU."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

import ringmoe
from bench.gpu import __main__ as command
from bench.gpu import attention, case, layer, rows
from bench.gpu.case import Case, Limits, measure, milliseconds, programs_of
from bench.specs import ExpertsShape

LIMITS = Limits(1e12, 1e11)
# What needs what isn't here: cuDNN itself, another library, minutes.
ABSENT = ("cudnn", "tokamax")
TINY = ExpertsShape("tiny", 256, 64, 32, 8, 2)


# Of each part; the others have the same programs with other numbers: of tokens, of heads, of choices.
DISTINCT = {
    f"{part}: {one.name}": one
    for part, kind in {
        "attention": "(T 2048.*causal|ragged.*full), gradients",  # whose first kernel is that of "forward"
        "hop": "(4 heads of 128|64 heads).*causal",
        "rows": "DeepSeek",
        "grouped": "Qwen3",
        "layer": "Qwen3.*tokens, both$",  # forward and backward; minutes each
    }.items()
    for one in command.PARTS[part][0]()
    if re.match(kind, one.name)
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", DISTINCT)
def test_all_programs_compile_for_a_gpu(name):
    try:
        sharding = SingleDeviceSharding(ringmoe.target("h200").devices()[0])
    except ImportError as error:
        pytest.skip(f"no compiler for h200: {error}")
    one = DISTINCT[name]
    types = one.types(sharding)
    for way, program in one.ways.items():
        if way in ABSENT:
            continue
        text = jax.jit(program).lower(*types).compile().as_text() or ""
        assert not name.startswith("attention") or way != "ours" or "mosaic_gpu" in text


def found(one: Case):
    (programs,) = programs_of([one])
    return {row.way: row for row in measure("part", one, programs, LIMITS)}


def of_numbers(**ways):
    one = Case("sines", ways, lambda: (jnp.arange(1024.0),), jnp.sin, flops=1024)
    return found(dataclasses.replace(one, unchecked=("other",)))


def test_what_is_right_is_timed_and_stands_beside_the_best_of_the_others():
    rows = of_numbers(ours=jnp.sin, slow=lambda x: jnp.sin(x) + 0 * jnp.sum(jnp.outer(x, x)), other=jnp.cos)
    for row in rows.values():
        assert row.ms is not None and row.ms > 0 and not row.said and row.rate == 1024 / row.ms * 1e3
        assert row.of_limit == row.rate / LIMITS.flops
    assert rows["ours"].off == 0 and rows["other"].off is None
    assert rows["ours"].beside == rows["slow"].ms / rows["ours"].ms and rows["slow"].beside is None


def test_what_is_wrong_is_not_timed():
    def fails(x):
        raise NotImplementedError("of no use")

    rows = of_numbers(ours=lambda x: jnp.sin(x) * 1.1, nan=lambda x: x * jnp.nan, fails=fails, good=jnp.sin)
    assert rows["ours"].ms is rows["nan"].ms is rows["fails"].ms is None
    assert rows["ours"].said == "WRONG" and rows["ours"].off == pytest.approx(0.1) and rows["nan"].said == "WRONG"
    assert rows["fails"].said == "NotImplementedError: of no use" and rows["good"].ms


def test_bits_that_differ_between_runs_are_told():
    class Program:
        """A program whose second run gives other bits."""

        calls = 0

        def __call__(self, x):
            self.calls += 1
            return jnp.sin(x) * (1 + 1e-6 * self.calls)

        def memory_analysis(self):
            return self

        temp_size_in_bytes = 0

    one = Case("sines", {"ours": jnp.sin}, lambda: (jnp.arange(1024.0),), jnp.sin)
    (programs,) = programs_of([one])
    (row,) = measure("part", one, programs | {"ours": Program()}, LIMITS)
    assert row.ms is None and row.said == "WRONG: bits differ between runs"


def test_what_is_too_large_is_not_run(monkeypatch):
    monkeypatch.setattr(case, "MOST_BYTES", -1)
    assert of_numbers(ours=jnp.sin)["ours"].said == "not run: needs too much memory"


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_is_held_against_the_rows_that_are_seen(monkeypatch, is_causal, backward):
    """What differs in one of them is wrong; gradients, too."""
    right = lambda q, k, v: ringmoe.dot_product_attention(q, k, v, is_causal=is_causal, implementation="xla")
    broken = lambda q, k, v: right(q, k, v).at[:, attention.seen(q.shape[1])[9]].multiply(2)
    monkeypatch.setattr(attention, "ways", lambda is_causal: {"ours": right, "broken": broken})
    rows = found(attention.case("tiny", attention.Shape(2, 192, 4, 2, 16), is_causal, backward))
    assert rows["ours"].ms and rows["ours"].off < 6e-3
    assert rows["broken"].said == "WRONG"


@pytest.mark.parametrize("one", [*rows.of_layer(TINY), layer.small(TINY)], ids=lambda one: one.name)
def test_rows_and_layers_are_right(one):
    for way, row in found(one).items():
        assert row.ms and not row.said, (way, row)


def test_a_layer_says_what_it_drops():
    rows = found(layer.whole(dataclasses.replace(TINY, num_tokens=4096), False, "skewed", layer.OURS))
    assert rows["ours 1.25"].said.startswith("drops ") and not rows["ours dropless"].said


def test_the_table_and_the_record_have_every_way_and_time_has_an_end(tmp_path, monkeypatch, capsys):
    """The second part's share is over before it begins."""
    sine = Case("sines", {"ours": jnp.sin, "plain": jnp.sin}, lambda: (jnp.arange(8.0),), jnp.sin, moved=64)
    parts = {"first": (lambda: [sine], 1.0), "second": (lambda: [dataclasses.replace(sine, name="late")], 0.0)}
    monkeypatch.setattr(command, "PARTS", parts)
    monkeypatch.setattr(command, "is_hopper", lambda kind: True)
    monkeypatch.setattr(command, "limits", lambda: LIMITS)
    monkeypatch.setattr(command, "measure", late_after(1, measure, monkeypatch))
    out = tmp_path / "out.json"
    command.main(["--out", str(out), "--minutes", "5"])
    record = json.loads(out.read_text())
    assert record["device"] == "cpu" and record["copy_bytes_per_second"] == 1e11 and len(record["rows"]) == 4
    first, *_, last = record["rows"]
    assert first["part"] == "first" and first["ms"] > 0 and first["rate"] == 64 / first["ms"] * 1e3
    assert last["case"] == "late" and last["ms"] is None and last["said"] == command.LATE
    printed = capsys.readouterr().out
    assert printed.count("late") >= 2 and "of limit" in printed


def late_after(calls, run, monkeypatch):
    """`run`, after whose first calls it is an hour later."""
    left = [calls]

    def later(*arguments):
        result = run(*arguments)
        left[0] -= 1
        if not left[0]:
            now = command.time.perf_counter
            monkeypatch.setattr(command.time, "perf_counter", lambda: now() + 3600)
        return result

    return later


def test_it_wants_a_gpu_and_parts_that_there_are(capsys):
    with pytest.raises(SystemExit, match="expected a Hopper GPU"):
        command.main([])
    with pytest.raises(SystemExit):
        command.main(["rings"])
    assert "no part rings; parts are attention, hop, rows, grouped, layer" in capsys.readouterr().err


def test_limits_are_of_this_machine():
    found = case.limits(256)
    assert found.flops > 1e8 and found.bandwidth > 1e8
    assert milliseconds({"": lambda: jnp.ones(8)})[""] > 0
