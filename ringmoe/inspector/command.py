"""`ringmoe inspect` and `ringmoe targets`: the command line of the inspector.

    ringmoe inspect train:step --target v5p:4x4x4 --mesh data=2,seq=32 --html out.html
    ringmoe inspect ops:attend --arg bf16[8,32768,128]@,seq --target v5e:4x4,v5e:8x8 --mesh seq=*
    --plot scaling.png ringmoe inspect compiled.txt --target h200x8 --fail-if-exposed 5%

PROGRAM is a file of scheduled HLO text, or MODULE:FUNCTION. With --arg the function itself is
inspected on those arguments; without, it is called, with the target's mesh when it has a parameter,
and returns the function to inspect and its arguments.
"""

import argparse
import importlib
import inspect as python_inspect
import math
import os
import pathlib
import re
import resource
import sys
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from ringmoe import inspector
from ringmoe.inspector import kernels, machines

_DTYPES = {
    "bf16": "bfloat16",
    "f16": "float16",
    "f32": "float32",
    "f64": "float64",
    "s8": "int8",
    "s32": "int32",
    "u8": "uint8",
    "u32": "uint32",
    "pred": "bool",
    "f8e4m3fn": "float8_e4m3fn",
    "f8e5m2": "float8_e5m2",
}


def add_arguments(parser: argparse.ArgumentParser, command: str = "inspect") -> None:
    """Adds the arguments of `ringmoe inspect` or (command="targets") `ringmoe targets`."""
    parser.set_defaults(inspector_command=command)
    if command == "targets":
        return
    parser.add_argument("program", metavar="PROGRAM", help="MODULE:FUNCTION, or a file of HLO text")
    parser.add_argument(
        "--target",
        metavar="NAME[,NAME...]",
        help="machines to inspect for; `ringmoe targets` lists them; default: the devices that are present",
    )
    parser.add_argument("--mesh", metavar="AXIS=SIZE,...", help="axes over the target's devices; one size may be *")
    parser.add_argument(
        "--arg",
        action="append",
        default=[],
        metavar="DTYPE[DIMS]@AXES",
        help="an argument of FUNCTION, as "
        "bf16[8,4096,128]@data,seq: an axis per dimension, a+b for two, nothing for none",
    )
    parser.add_argument("--html", metavar="FILE", help="write a self-contained page")
    parser.add_argument("--json", metavar="FILE", help="write the report, or a list of them for several targets")
    parser.add_argument("--plot", metavar="FILE", help="picture of time and memory over the targets")
    parser.add_argument("--kernels", action="store_true", help="add the static cost of each Pallas kernel")
    parser.add_argument(
        "--fail-if-exposed",
        metavar="PERCENT",
        type=_percent,
        help="exit with 1 when more of the wire time than this is exposed",
    )
    parser.add_argument("--timeout", metavar="SECONDS", type=_positive, help="give up after so long")
    parser.add_argument(
        "--memory", metavar="GIB", type=_gib, help="give up when it takes more of this machine's memory (Linux; from 1)"
    )
    parser.add_argument(
        "--in-process",
        action="store_true",
        help="no process of its own, which otherwise bears it when a compiler dies; no --timeout or --memory then",
    )


def main(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit status: 0, 1 when too much is exposed, 2 after an
    error."""
    if args.inspector_command == "targets":
        _print_targets(_console())
        return 0
    errors = Console(stderr=True)
    try:
        reports = _inspect_all(args, errors)
    except (ValueError, ImportError, RuntimeError, MemoryError) as error:
        errors.print(
            "error:",
            error if str(error) else type(error).__name__,
            *getattr(error, "__notes__", ()),
            style="red",
            markup=False,
            highlight=False,
        )
        return 2
    for report in reports:
        _console().print(report)
    if args.json:
        text = [report.to_json() for report in reports]
        pathlib.Path(args.json).write_text(text[0] if len(text) == 1 else "[" + ",\n".join(text) + "]")
    if args.html:
        for report in reports:
            path = pathlib.Path(args.html)
            if len(reports) > 1:
                path = path.with_stem(f"{path.stem}-{report.target.replace(':', '-')}")
            path.write_text(report.to_html())
    if args.plot:
        plot(reports, args.plot)
    worst = max(report.exposed_fraction for report in reports)
    if args.fail_if_exposed is not None and worst > args.fail_if_exposed:
        errors.print(
            f"{worst:.1%} of the wire time is exposed, more than {args.fail_if_exposed:.1%}",
            style="red",
        )
        return 1
    return 0


def plot(reports: list[inspector.OverlapReport], path: str) -> None:
    """Writes a picture of how time and memory change over the reports' targets."""
    from matplotlib.figure import Figure  # a second to load, for a picture only

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [report.target for report in reports]
    above: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 8}
    compute = [report.compute_us / 1e3 for report in reports]
    left.bar(names, compute, color="#3b7dd8", label="compute")
    left.bar(
        names,
        [report.exposed_us / 1e3 for report in reports],
        bottom=compute,
        color="#d43d3d",
        label="exposed",
    )
    for index, report in enumerate(reports):
        label = f"{report.exposed_fraction:.0%} exposed"
        left.annotate(label, (index, report.us / 1e3), **above)
    left.set(title=f"{reports[0].program}: one run", ylabel="milliseconds")
    left.margins(y=0.15)
    left.legend(frameon=False)
    peaks = [(report.peak_bytes or 0) / 2**30 for report in reports]
    right.bar(names, peaks, color="#24885a", label="peak")
    for index, report in enumerate(reports):
        part = peaks[index] * 2**30 / report.hbm_bytes
        right.annotate(f"{part:.1%} of HBM", (index, peaks[index]), **above)
    right.set(title="memory a device", ylabel="GiB")
    right.margins(y=0.15)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _console() -> Console:
    """Standard output; a file or a pipe gets lines as wide as the tables need."""
    return Console(width=None if sys.stdout.isatty() else 132)


def _inspect_all(args: argparse.Namespace, console: Console) -> list[inspector.OverlapReport]:
    if args.kernels:
        kernels.request()
    if args.target and not jax.config.jax_platforms and "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")  # nothing runs, so nothing is looked for
    reports = []
    with console.status("starting") as status:
        for name in args.target.split(",") if args.target else [None]:
            machine = machines.target(name) if name else machines.present(jax.devices())
            axes: Any = _axes(args.mesh, machine)
            if pathlib.Path(args.program).is_file():  # text needs no compiler, so no devices
                mesh, program, values = axes, pathlib.Path(args.program), ()
            else:
                mesh = machine.mesh(axes)
                program, *values = _load(args.program, args.arg, mesh)
            reports.append(
                inspector.inspect(
                    program,
                    *values,
                    target=machine.name,
                    mesh=mesh,
                    kernels=args.kernels,
                    progress=status.update,
                )
            )
    return reports


def _load(name: str, specs: list[str], mesh: Mesh) -> tuple[Any, ...]:
    """The function to inspect and its arguments, from MODULE:FUNCTION."""
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"PROGRAM {name!r} is no file, expected one of HLO text, or MODULE:FUNCTION")
    sys.path.insert(0, os.getcwd())
    try:
        function: Any = importlib.import_module(module)
        for part in attribute.split("."):
            function = getattr(function, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"PROGRAM {name!r} cannot be loaded ({error}), expected MODULE:FUNCTION importable from here"
        ) from error
    finally:
        sys.path.pop(0)
    if specs:
        return (function, *(_argument(spec, mesh) for spec in specs))
    takes_mesh = bool(python_inspect.signature(function).parameters)
    made = function(mesh) if takes_mesh else function()
    if not isinstance(made, tuple) or not made or not callable(made[0]):
        raise ValueError(
            f"{name} returned a {type(made).__name__}, expected a tuple of the function to "
            "inspect and its arguments; or give the arguments with --arg"
        )
    return made


def _argument(spec: str, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """bf16[8,4096]@data,seq -> a ShapeDtypeStruct sharded over the mesh."""
    found = re.fullmatch(r"(\w+)\[([\d,]*)\](?:@([\w,+]*))?", spec)
    if not found or found.group(1) not in _DTYPES:
        raise ValueError(
            f"--arg {spec!r}, expected DTYPE[DIMS]@AXES such as bf16[8,4096,128]@data,seq, with a "
            "dtype of "
            f"{', '.join(_DTYPES)}"
        )
    shape = tuple(int(dim) for dim in found.group(2).split(",") if dim)
    axes = [tuple(axis for axis in part.split("+") if axis) for part in (found.group(3) or "").split(",")]
    unknown = {axis for part in axes for axis in part} - set(mesh.axis_names)
    if unknown:
        raise ValueError(f"--arg {spec!r} names the axes {sorted(unknown)}, the mesh has {list(mesh.axis_names)}")
    return jax.ShapeDtypeStruct(
        shape,
        _DTYPES[found.group(1)],
        sharding=NamedSharding(mesh, PartitionSpec(*(part or None for part in axes))),
    )


def _axes(text: str | None, machine: machines.Target) -> dict[str, int] | None:
    """data=2,seq=* -> axis sizes; * is what the others leave of the target's devices."""
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    if any(not axis or not (size.isdecimal() or size == "*") for axis, _, size in pairs) or text.count("*") > 1:
        raise ValueError(f"--mesh {text!r}, expected AXIS=SIZE,... such as data=2,seq=32, with at most one size *")
    sizes = {axis: int(size) if size != "*" else 0 for axis, _, size in pairs}
    rest = machine.num_devices // max(1, math.prod(size for size in sizes.values() if size))
    return {axis: size or rest for axis, size in sizes.items()}


def _percent(text: str) -> float:
    """5% or 0.05 -> 0.05."""
    value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text}, expected a part of the wire time such as 5% or 0.05")
    return value


def _positive(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}, expected a number above 0")
    return value


def _gib(text: str) -> float:
    """GiB for a process that has to hold a compiler."""
    value = _positive(text)
    if value < 1 or not hasattr(resource, "prlimit"):
        raise argparse.ArgumentTypeError(
            f"{text}, expected 1 or more, on Linux: compilers need half of that for themselves"
        )
    return value


def _print_targets(console: Console) -> None:
    """Figures by chip, then the names, then where the figures come from."""
    table = Table(box=None, pad_edge=False)
    for title in (
        "chip",
        "devices",
        "bf16",
        "int8",
        "fp8",
        "f32",
        "HBM",
        "HBM rate",
        "links",
        "link, one way",
        "joined by links",
        "network, one way",
    ):
        table.add_column(title, justify="left" if title == "chip" else "right")
    groups = {
        chip: [name for name in machines.targets() if machines.target(name).chip == chip] for chip in machines.CHIPS
    }
    for chip, names in groups.items():
        one = machines.target(names[0])
        rates = [
            f"{one.matmul_flops[key] / 1e12:.4g} T" if key in one.matmul_flops else ""
            for key in ("bf16", "s8", "f8", "f32")
        ]
        table.add_row(
            chip,
            str(machines.CHIPS[chip].devices_per_chip),
            *rates,
            f"{one.hbm_bytes / 2**30:.4g} GiB",
            f"{one.hbm_bandwidth / 1e9:.4g} GB/s",
            str(one.num_links),
            f"{one.link_bandwidth / 1e9:.4g} GB/s",
            f"{machines.NETWORKS[chip].domain} GPUs" if one.kind == "gpu" else "a slice" if one.kind == "tpu" else "",
            f"{one.network_bandwidth / 1e9:.4g} GB/s",
        )
    console.print(
        "Dense FLOP/s, memory, bandwidth and network of one device; links of one chip.",
        table,
        "",
        sep="\n",
        highlight=False,
    )
    console.print(
        "Names for --target (libtpu takes other TPU shapes too; 2*v5p:4x4x4 is two slices; a GPU name takes any count "
        "that links join, as h200x4, and whole multiples of that, as h200x24):"
    )
    for names in groups.values():
        console.print("  " + "  ".join(names), highlight=False)
    console.print("\nWhere the figures come from:")
    for chip, names in groups.items():
        sources = machines.target(names[0]).sources
        for source in dict.fromkeys(sources.values()):
            figures = ", ".join(name for name, value in sources.items() if value == source)
            console.print(f"  {chip}: {figures}: {source}", highlight=False, markup=False)


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(prog="ringmoe")
    _commands = _parser.add_subparsers(required=True)
    for _name in ("inspect", "targets"):
        add_arguments(_commands.add_parser(_name), _name)
    sys.exit(main(_parser.parse_args()))
