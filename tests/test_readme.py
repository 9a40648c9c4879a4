"""Every program in the README and the documentation runs by itself, and prints what it says."""

import importlib.util
import inspect
import pathlib
import re

import pytest

import ringmoe

ROOT = pathlib.Path(__file__).parents[1]
BLOCKS = [
    pytest.param(block, id=f"{path.name}-{number}")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.S))
]


@pytest.mark.sampled
@pytest.mark.parametrize("block", BLOCKS)
def test_the_program_runs(block, tmp_path, capsys):
    if "target=" in block and not importlib.util.find_spec("libtpu"):
        pytest.skip("compiles for a TPU: needs libtpu")
    file = tmp_path / "program.py"  # tracebacks read it
    file.write_text(block)
    names = {"__name__": "__main__"}
    exec(compile(block, file, "exec"), names)
    output = capsys.readouterr().out
    for promised in re.findall(r"# -> (.*)", block):
        assert promised in output
    if "ringmoe.explain(" in block:
        assert re.search("│ attention +│ 1 .*│ seq ", output), output
    if metrics := names.get("metrics"):  # a layer that looks broken is no advertisement
        assert metrics.drop_fraction < 0.05 and metrics.expert_load.min() > 0


def test_the_readme_has_its_programs():
    assert len(re.findall("```python", (ROOT / "README.md").read_text())) >= 4


def test_every_public_name_is_on_the_apis_page():
    page = set(re.findall(r"^\.\. auto(?!module)\w+:: (ringmoe\.\w+)$", (ROOT / "docs/api.md").read_text(), re.M))
    public = {f"ringmoe.{n}" for n, x in vars(ringmoe).items() if not (n.startswith("_") or inspect.ismodule(x))}
    assert page == public
