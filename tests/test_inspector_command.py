"""`ringmoe inspect` and `ringmoe targets`, as a person and a CI job use them."""

import argparse
import dataclasses
import io
import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest
from jax.experimental.pallas.ops.gpu import attention_mgpu

from ringmoe import inspector
from ringmoe.inspector import arguments, command, kernels, machines
from tests import inspector_programs as programs
from tests.test_inspector_report import looped, looped_text

CASES = """
import sys
sys.path.insert(0, {tests!r})
from tests import inspector_programs as programs

def ring(mesh):
    return programs.ring(dict(mesh.shape), merge="inside")

def small(mesh):
    return (lambda a: a @ a.T), programs.spec((1024, 1024), "bfloat16", dict(mesh.shape),
    *mesh.axis_names)

def fixed():
    return (lambda a: a * 2), programs.spec((1024, 1024), "bfloat16", {{"devices": 1}})

def plain(a, b):
    return a @ b

def wrong(mesh):
    return 5

def broken(mesh):
    def fail(a):
        raise ValueError("no such luck")
    return fail, programs.spec((8,), "float32", dict(mesh.shape))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a module `cases` to inspect."""
    (tmp_path / "cases.py").write_text(CASES.format(tests=str(pathlib.Path(__file__).parent)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "cases", raising=False)
    return tmp_path


def run(*words, name="inspect"):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser, name)
    return command.main(parser.parse_args(words))


def test_writes_what_it_is_asked_for(here, capsys):
    assert (
        run(
            "cases:small",
            "--target",
            "v5p:2x2x2",
            "--mesh",
            "seq=*",
            "--html",
            "o.html",
            "--json",
            "o.json",
        )
        == 0
    )
    record = json.loads((here / "o.json").read_text())
    assert record["mesh"] == {"seq": 8} and record["target"] == "v5p:2x2x2" and record["collectives"]
    assert (here / "o.html").read_text().startswith("<!doctype html>") and "exposed" in capsys.readouterr().out


def test_sweep(here):
    words = ("cases:small", "--target", "v5e:2x2,v5e:2x4", "--mesh", "seq=*")
    assert run(*words, "--plot", "o.png", "--json", "o.json", "--html", "o.html") == 0
    assert [r["mesh"] for r in json.loads((here / "o.json").read_text())] == [
        {"seq": 4},
        {"seq": 8},
    ]
    assert (here / "o.png").read_bytes().startswith(b"\x89PNG") and (here / "o-v5e-2x4.html").exists()


def test_arguments_on_the_command_line(here):
    argument = "bf16[1024,512]@data,seq"
    words = ("cases:plain", "--target", "h200x8", "--mesh", "data=2,seq=4", "--json", "o.json")
    assert run(*words, "--arg", argument, "--arg", "bf16[512,256]") == 0
    assert json.loads((here / "o.json").read_text())["collectives"]
    assert run("cases:fixed", "--target", "h200") == 0


def test_gate(here, capsys):
    words = ("cases:small", "--target", "v5p:2x2x2", "--mesh", "seq=8")
    assert run(*words, "--fail-if-exposed", "5%") == 1 and "more than 5.0%" in capsys.readouterr().err
    assert run(*words, "--fail-if-exposed", "100%") == 0
    assert run("cases:fixed", "--target", "h200", "--fail-if-exposed", "0%") == 0


def told(capsys):
    return " ".join(capsys.readouterr().err.split())


def saved(here, **changes):
    """A report of the looped program of the report's tests, changed, in a file."""
    report = dataclasses.replace(looped(), **{"peak_bytes": 2**30, **changes})
    (here / "saved.json").write_text(report.to_json())
    return report


LIMITS = [
    (("--fail-if-waiting", "10%"), "of a step is spent waiting for the wire, more than 10.0%"),
    (("--max-time", "12us"), "us, more than 12 us"),
    (("--max-time", "0.1ms"), "us, more than 100 us"),
]


@pytest.mark.parametrize(("words", "line"), LIMITS)
def test_limits_of_text(here, capsys, words, line):
    (here / "p.txt").write_text(looped_text())
    assert run("p.txt", "--target", "h200x8", *words) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("h200x8: ") and line in lines[0]
    assert run("p.txt", "--target", "h200x8", words[0], "100%" if words[1].endswith("%") else "1s") == 0


def test_every_limit_that_is_passed_is_told(here, capsys):
    words = ("cases:small", "--target", "v5p:2x2x2", "--mesh", "seq=8")
    assert (
        run(*words, "--max-time", "0us", "--max-memory", "1KiB", "--fail-if-exposed", "0%", "--fail-if-waiting", "0")
        == 1
    )
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and "of memory, more than 1 KiB" in lines[-1]
    assert run(*words, "--max-memory", "0.0001%") == 1 and run(*words, "--max-memory", "90%") == 0
    assert run(*words, "--max-memory", "95GiB") == 0


def test_a_baseline(here, capsys):
    words = ("cases:small", "--target", "v5p:2x2x2", "--mesh", "seq=8")
    assert run(*words, "--json", "now.json") == 0
    assert run(*words, "--baseline", "now.json", "--tolerance", "0%") == 0
    record = json.loads((here / "now.json").read_text())
    for change, line in (
        ({"us": record["us"] / 1.05, "exposed_us": record["exposed_us"]}, "a step takes"),
        ({"exposed_us": record["exposed_us"] - 0.05 * record["us"]}, "for the wire, more than the baseline's"),
        ({"peak_bytes": int(record["peak_bytes"] / 1.05)}, "of memory, more than the baseline's"),
    ):
        (here / "then.json").write_text(json.dumps([record | change]))
        capsys.readouterr()
        assert run(*words, "--baseline", "then.json") == 1 and line in told(capsys)
        assert run(*words, "--baseline", "then.json", "--tolerance", "6%") == 0


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        (
            {"target": "h100x8", "peak_bytes": None},
            (),
            "the baseline has no report for h200x8, expected one; it has h100x8",
        ),
        ({}, (), "cannot be compared: make both"),
        ({"peak_bytes": None}, ("--max-memory", "90%"), "so --max-memory cannot be checked"),
    ],
)
def test_limits_that_cannot_be_checked(here, capsys, changes, words, message):
    (here / "p.txt").write_text(looped_text())
    saved(here, **changes)
    assert run("p.txt", "--target", "h200x8", "--baseline", "saved.json", *words) == 2
    assert message in told(capsys)


def test_a_baseline_that_cannot_be_read(here, capsys):
    assert run("cases:small", "--target", "v5p:2x2x2", "--baseline", "none.json") == 2 and "No such file" in told(
        capsys
    )
    (here / "bad.json").write_text('{"schema": "other"}')
    assert run("cases:small", "--target", "v5p:2x2x2", "--baseline", "bad.json") == 2
    assert "schema is 'other'" in told(capsys)


def test_an_error_of_the_programs_own_is_no_passed_limit(here, capsys):
    (here / "cases.py").write_text("def f(mesh):\n    return 1 + {}\n")
    assert run("cases:f", "--target", "h200", "--max-time", "1s") == 2
    assert "unsupported operand" in told(capsys)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (arguments.percent, "much", "expected a part such as 5%"),
        (arguments.duration, "12", "expected a time such as 12ms"),
        (arguments.duration, "12 h", "expected a time such as 12ms"),
        (arguments.memory, "28GB", "expected a size such as 28GiB"),
        (arguments.memory, "128%", "expected a part such as 5%"),
        (arguments.positive, "0", "expected a number above 0"),
        (arguments.positive, "inf", "expected a number above 0"),
    ],
)
def test_limits_that_are_none(kind, text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        kind(text)


def test_limits_with_units():
    assert [arguments.duration(t) for t in ("12ms", "1.5 s", "800us")] == [12e3, 1.5e6, 800]
    assert arguments.memory("28GiB")(0) == 28 * 2**30 and arguments.memory("90%")(1000) == 900


def test_standard_input(here, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(looped_text()))
    assert run("-", "--target", "h200x8,h100x8", "--mesh", "seq=8", "--trace", "t.json") == 0
    out = capsys.readouterr().out
    assert "t on h200x8, mesh seq=8" in out and "t on h100x8" in out
    assert json.loads((here / "t-h100x8.json").read_text())["traceEvents"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("module @stablehlo"))
    assert run("-", "--target", "h200x8") == 2 and "not HLO text" in told(capsys)


def test_flops_of_the_model(here):
    (here / "p.txt").write_text(looped_text())
    assert run("p.txt", "--target", "h200x8", "--model-flops", "1e12", "--json", "o.json") == 0
    record = json.loads((here / "o.json").read_text())
    assert record["mfu"] == pytest.approx(1e12 / 8 / (record["us"] * 1e-6 * 989.4e12))


def test_nothing_to_inspect(capsys):
    assert run() == 2 and "no PROGRAM" in told(capsys)


def test_text_file_and_devices_that_are_present(here):
    function, x = (lambda a: a + 1), programs.spec((64,), "float32", {"devices": 8})
    report = inspector.inspect(function, x)
    assert report.target == "cpux8"
    (here / "p.txt").write_text(
        "HloModule t, is_scheduled=true\n\nENTRY %e () -> f32[] {\n  ROOT %c = f32[] constant(0)\n}\n"
    )
    assert run("p.txt", "--target", "h200x8") == run("cases:fixed") == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nothing",), "is no file, expected one of HLO text, or MODULE:FUNCTION"),
        (("nothing:f",), "cannot be loaded"),
        (("cases:nothing",), "cannot be loaded"),
        (("cases:wrong",), "returned a int, expected a tuple"),
        (("cases:broken",), "no such luck"),
        (("cases:small", "--mesh", "seq"), "expected AXIS=SIZE"),
        (("cases:small", "--mesh", "a=*,b=*"), "at most one size *"),
        (("cases:small", "--mesh", "seq=3"), "has 3 devices, expected 8"),
        (("cases:plain", "--arg", "q8[3]"), "expected DTYPE[DIMS]@AXES"),
        (("cases:plain", "--arg", "bf16[3]@x"), "names the axes ['x']"),
        (("cases:small", "--target", "v9:1"), "expected one such as"),
    ],
)
def test_mistakes_are_told_in_a_line(here, capsys, words, message):
    assert run(*words, *(() if "--target" in words else ("--target", "v5e:2x4"))) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert message in told and "Traceback" not in told


def test_a_failing_compilation_names_the_target(here, capsys):
    assert run("cases:broken", "--target", "v5e:2x4") == 2
    assert "target 'v5e:2x4'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("text", ["7", "-1%", "101%"])
def test_thresholds_out_of_range(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a part such as"):
        arguments.percent(text)


def test_targets_are_listed(capsys):
    assert run(name="targets") == 0
    out = capsys.readouterr().out
    assert all(name in out.split() for name in machines.targets()) and "459 T" in out and "data sheet" in out


def test_kernels_of_a_tpu_program(here):
    """In a process of its own, for libtpu has to be asked before JAX starts."""
    root = str(pathlib.Path(command.__file__).parents[2])
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "ringmoe.inspector.command",
            "inspect",
            "cases:ring",
            "--target",
            "v5e:2x2",
            "--mesh",
            "seq=4",
            "--kernels",
            "--json",
            "o.json",
        ],
        env=os.environ | {"PYTHONPATH": root, "LIBTPU_INIT_ARGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (kernel,) = json.loads((here / "o.json").read_text())["kernels"]
    assert kernel["name"].startswith("attention_block") and kernel["bundles"] >= kernel["busy_bundles"] > 100
    assert 0.1 < kernel["units"]["MXU"] <= 1 and "bundles" in done.stdout


def test_kernels_of_a_gpu_program():
    x = programs.spec((1, 1024, 8, 128), jnp.float16, {"devices": 1})
    tuning = attention_mgpu.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2)
    report = inspector.inspect(
        lambda q, k, v: attention_mgpu.attention(q, k, v, tuning),
        x,
        x,
        x,
        target="h200",
        kernels=True,
    )
    (kernel,) = report.kernels
    assert kernel.registers == 168 and kernel.spills == 0 and 165888 <= kernel.shared_bytes < 232448
    assert "168 registers a thread" in str(report) and "kernels" in report.to_json()


def test_schedules_are_read():
    text = "== CAPACITY:\nMXU, VALU, VLOAD:FILL, VSTORE:SPILL\n 4 4 3 1\n== UTILIZATION:\n"
    text += "0 1 0 1\n4 2 0 0\n0 2 3 0\n2 0 0 0\n0 4 0 1\n"
    kernel = kernels.tpu_kernel("k", text)
    assert (kernel.bundles, kernel.busy_bundles, kernel.spills, kernel.fills) == (5, 3, 2, 3)
    assert kernel.units["MXU"] == pytest.approx(6 / 12) and kernel.units["VALU"] == pytest.approx(4 / 12)
    assert kernels.tpu_kernel("k", text.replace("4 2 0 0", "0 2 0 0").replace("2 0 0 0", "0 0 0 0")).busy_bundles == 5


def test_schedules_of_another_form_are_told():
    with pytest.raises(ValueError, match="schedule of kernel 'k' begins 'nothing here', expected a line of units"):
        kernels.tpu_kernel("k", "nothing here")


def test_kernels_asked_too_late(tmp_path, monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--xla_jf_dump_to={tmp_path}")
    with kernels.dumping(tpu=True) as dumps, pytest.raises(RuntimeError, match="JAX started before"):
        kernels.read(dumps, frozenset({"kernel"}))
    (tmp_path / "1-kernel-9-final_hlo-static-per-bundle-utilization.txt").write_text("MXU, VALU\n4 4\n1 1\n")
    with kernels.dumping(tpu=True) as dumps:
        (tmp_path / "2-kernel-9-final_hlo-static-per-bundle-utilization.txt").write_text("MXU, VALU\n4 4\n1 1\n1 1\n")
        assert [k.bundles for k in kernels.read(dumps, frozenset({"kernel"}))] == [2]  # not the one from before
    assert "MOSAIC_GPU_DUMP_TO" not in os.environ


def test_dumps_do_not_pile_up(monkeypatch):
    """What libtpu wrote is gone once it was read; and it isn't asked where only GPUs' compilers are wanted."""
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
    with kernels.dumping(tpu=False) as dumps:
        assert dumps.tpu is None and dumps.gpu.is_dir() and not kernels.read(dumps, frozenset())
    assert not os.environ["LIBTPU_INIT_ARGS"]
    with kernels.dumping(tpu=True) as dumps:
        (dumps.tpu / "1-kernel.txt").write_text("")
        assert str(dumps.tpu) in os.environ["LIBTPU_INIT_ARGS"]
    assert dumps.tpu.is_dir() and not list(dumps.tpu.iterdir())
