"""The command line outlives its compiler."""

import argparse
import os
import pathlib
import signal
import subprocess
import sys

import pytest

import ringmoe
from ringmoe import cli
from ringmoe.inspector import arguments, guard

ROOT = str(pathlib.Path(ringmoe.__file__).parents[1])
CASES = """
import os, time
import numpy as np
import jax, jax.numpy as jnp

x = jax.ShapeDtypeStruct((8, 8), jnp.float32)

def fine():
    return (lambda a: a + 1), x

def dies():
    os.abort()

def hangs():
    time.sleep(600)

def hungry():
    np.ones(2**28)
    return fine()
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "guarded.py").write_text(CASES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")]))


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (("guarded:fine",), 0, "a step ="),
        (("guarded:dies",), 2, "the compiler died of SIGABRT: what it wrote last"),
        (("guarded:dies", "--memory", "16"), 2, "SIGABRT; it had --memory 16 GiB"),
        (("guarded:hangs", "--timeout", "0.5"), 2, "stopped after --timeout 0.5 seconds"),
        (("guarded:hungry", "--memory", "1.5"), 2, "error: Unable to allocate 2.00 GiB"),
        (("guarded:hungry", "--memory", "16"), 0, "a step ="),
        (("guarded:nothing",), 2, "cannot be loaded"),
    ],
)
def test_whatever_happens_there_is_a_line_and_a_status(here, capfd, words, status, told):
    assert cli.main(["inspect", *words, "--target", "v5e:1x1"]) == status
    captured = capfd.readouterr()
    assert told in " ".join((captured.out + captured.err).split())


def test_in_process(here, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    assert cli.main(["inspect", "guarded:fine", "--target", "v5e:1x1", "--in-process"]) == 0


def test_an_interrupt_is_for_both(monkeypatch, capfd):
    class Child(subprocess.Popen):
        def wait(self, timeout=None):
            if not hasattr(self, "told"):
                self.told = True
                self.send_signal(signal.SIGINT)
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Child)
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # in the background it may be ignored, by children too
    try:
        assert guard.run([sys.executable, "-c", "import time; time.sleep(600)"]) == 2
    finally:
        signal.signal(signal.SIGINT, before)
    assert "error: interrupted" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("option", "text"), [("positive", "0"), ("positive", "-3"), ("positive", "inf"), ("gib", "0.5")]
)
def test_limits_out_of_range(option, text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected"):
        getattr(arguments, option)(text)
