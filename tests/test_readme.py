"""The README's programs run as they stand there."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_readmes_programs_run(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(blocks) >= 3
    if (inspects := [b for b in blocks if "ringmoe.inspect" in b]) and not importlib.util.find_spec("libtpu"):
        blocks = [b for b in blocks if b not in inspects]
        print("left out without libtpu:", *inspects)
    program = tmp_path / "readme.py"
    program.write_text("\n".join(blocks))
    environment = os.environ | {"PYTHONPATH": str(README.parent)}
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=900, env=environment)
    if done.returncode:
        pytest.fail(done.stdout + done.stderr)
    assert "all_to_all" in done.stdout or "ring" in done.stdout
    assert "train_step" in done.stdout
