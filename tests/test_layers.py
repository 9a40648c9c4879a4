"""Imports point one way, stand at the top of their file, and touch JAX's private parts in one module only."""

import ast
import pathlib
import re
import sys
import tomllib

import pytest

import ringmoe

ROOT = pathlib.Path(__file__).parents[1] / "ringmoe"

# What each part of ringmoe/ may import of the others. A new file must be given a place here.
FLOOR = ("errors", "reference", "reference_moe", "masks", "interface", "ffn", "softmax", "dropout")
ORDER = (FLOOR, ("meshes",), ("rules", "compat"), ("pallas",), ("plan",), ("circles", "schedule"), ("primitives",),
         ("attention", "decode", "router", "dense", "moe"), ("lowering",), ("demo",), ("needle",), ("cli",))  # fmt: skip
LEVEL = {part: level for level, parts in enumerate(ORDER) for part in parts}
# `router` is plain jnp and needs only `errors`; among equals these edges exist and none leads back.
AMONG_EQUALS = {
    ("interface", "masks"),
    ("masks", "errors"),
    ("moe", "router"),
    ("moe", "dense"),
    ("decode", "attention"),
}
FORBIDDEN = {("schedule", "pallas"), ("plan", "pallas")}
ALONE = ("inspector",)  # imports nothing of ringmoe
# Its rooms, lowest first.
ROOMS = ("__init__", "guard", "chips", "networks", "topology", "machines", "grammar", "reader", "collectives", "scalars",
         "loops", "flops", "wire", "axes", "mosaic", "estimate", "timeline", "clock", "kernels", "memory", "words", "tables",
         "html", "trace", "record", "report", "diff", "gates", "plot", "inspect", "search", "arguments", "listing",
         "command")  # fmt: skip
PUBLIC = ("__init__",)  # imports the public parts

# (file, imported module): why it is imported inside a function.
INSIDE_FUNCTIONS = {
    ("cli.py", "ringmoe.demo"): "the demo needs the extra `examples` and sets XLA's flags before jax starts",
    ("cli.py", "ringmoe.needle"): "so does the reference system",
    ("inspector/plot.py", "matplotlib.figure"): "a second to load, for a picture only; in the extra `examples`",
}


def files():
    return sorted(path for path in ROOT.rglob("*.py"))


def part(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(tree: ast.AST):
    """(module, node) of every import; `from ringmoe import rules` counts as ringmoe.rules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            assert node.module is not None
            whole = node.module in ("ringmoe", "jax")
            yield from ((f"{node.module}.{alias.name}" if whole else node.module, node) for alias in node.names)


def internal(tree):
    return {name.split(".")[1] for name, _ in imported(tree) if name.startswith("ringmoe.")}


def test_every_part_has_its_place():
    known = {*LEVEL, *ALONE, *PUBLIC, "__main__"}
    assert {part(path) for path in files()} <= known


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    here, tree = part(path), ast.parse(path.read_text())
    found = internal(tree) - {here}
    if here in ALONE:
        assert not found
    elif here in ("demo", "needle"):
        found -= {"demo"}  # the needle's text and norms are the demo's
        assert all(name in vars(ringmoe) for name in found), f"{here} imports {found}, expected ringmoe's public face"
    elif here in LEVEL:
        for other in found:
            assert (here, other) not in FORBIDDEN, f"{here} may not import {other}"
            below = other in LEVEL and LEVEL[other] < LEVEL[here]
            assert below or other in ALONE or (here, other) in AMONG_EQUALS, f"{here} may not import {other}"


@pytest.mark.parametrize("path", sorted((ROOT / "inspector").glob("*.py")), ids=lambda path: path.stem)
def test_rooms_of_the_inspector_stand_on_lower_ones(path):
    names = set(imported_rooms(path))
    assert path.stem == "__init__" or names <= set(ROOMS[: ROOMS.index(path.stem)])


def imported_rooms(path):
    """Names of the rooms that a file imports, or imports from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ringmoe.inspector"):
            room = node.module.split(".")[2:]
            yield from room or (alias.name for alias in node.names)


def test_imports_among_equals_have_no_cycle():
    seen = {}
    for path in files():
        here = part(path)
        seen.setdefault(here, set()).update(internal(ast.parse(path.read_text())) - {here})
    for one, other in AMONG_EQUALS:
        assert one not in seen.get(other, ()), f"{one} <-> {other}"


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_private_parts_of_jax_are_touched_in_compat_alone(path):
    private = [name for name, _ in imported(ast.parse(path.read_text())) if name.startswith("jax._src")]
    assert not private or path == ROOT / "compat.py", private


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_inside_a_function(path):
    tree, name = ast.parse(path.read_text()), str(path.relative_to(ROOT))
    functions = [
        node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    ]
    hidden = {module for function in functions for module, _ in imported(function)}
    assert not {module for module in hidden if (name, module) not in INSIDE_FUNCTIONS}


def test_every_package_that_is_imported_is_declared():
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    name = lambda requirement: re.match(r"[\w-]+", requirement).group().removesuffix("-py").removesuffix("-checkpoint")
    declared = {name(r) for r in project["dependencies"]}
    extra = {name(r) for r in project["optional-dependencies"]["examples"]}
    for path in files():
        packages = {module.split(".")[0] for module, _ in imported(ast.parse(path.read_text()))}
        found = packages - sys.stdlib_module_names - {"ringmoe"} - declared
        assert found <= (extra if part(path) in ("demo", "needle", "inspector") else set()), f"{path}: {found}"


def test_kernels_do_not_communicate():
    """Rule of the interface: a schedule moves data, no kernel does but the exchange's own, and a plan holds no arrays."""
    for path in {*(ROOT / "pallas").glob("*.py")} - {ROOT / "pallas" / "remote_tpu.py"}:
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not names & {"ppermute", "psum", "all_gather", "all_to_all", "psum_scatter"}, path
        assert path.stem.endswith("_gpu") or "axis_index" not in names, path  # there also a block's place in its grid
