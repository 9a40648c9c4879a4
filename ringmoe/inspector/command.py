"""`ringmoe inspect` and `ringmoe targets`: the command line of the inspector.

    ringmoe inspect train:step --target v5p:4x4x4 --mesh data=2,seq=32 --html out.html
    ringmoe inspect ops:attend --arg bf16[8,32768,128]@,seq --target v5e:4x4,v5e:8x8 --mesh seq=* --plot scaling.png
    ringmoe inspect compiled.txt --target h200x8 --fail-if-waiting 10%
    ringmoe inspect train:step --target v5p:4x4x4 --search data,seq
    ringmoe inspect --diff before.json after.json

PROGRAM is a file of scheduled HLO text ("-" is standard input), or MODULE:FUNCTION. With --arg the function itself is
inspected on those arguments; without, it is called, with the target's mesh when it has a parameter, and returns the function
to inspect and its arguments.

The exit status is 0, 1 when a limit is passed, 2 when something could not be read, compiled or checked.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ringmoe import inspector
from ringmoe.inspector import arguments, gates, kernels, listing, machines, plot, record, tables, words
from ringmoe.inspector.report import OverlapReport


def add_arguments(parser: argparse.ArgumentParser, command: str = "inspect") -> None:
    """Adds the arguments of `ringmoe inspect` or (command="targets") `ringmoe targets`."""
    parser.set_defaults(inspector_command=command)
    if command == "targets":
        return
    add = parser.add_argument
    add("program", metavar="PROGRAM", nargs="?", help="MODULE:FUNCTION, a file of HLO text, or - for standard input")
    add(
        "--target",
        metavar="NAME[,NAME...]",
        help="machines to inspect for; `ringmoe targets` lists them; default: the devices that are present",
    )
    add("--mesh", metavar="AXIS=SIZE,...", help="axes over the target's devices; one size may be *")
    add(
        "--arg",
        action="append",
        default=[],
        metavar="DTYPE[DIMS]@AXES",
        help="an argument of FUNCTION, as "
        "bf16[8,4096,128]@data,seq: an axis per dimension, a+b for two, nothing for none",
    )
    add("--model-flops", metavar="N", type=arguments.positive, help="FLOPs of the model in a step on all devices: MFU")
    add("--kernels", action="store_true", help="add the static cost of each Pallas kernel")
    add("--search", metavar="AXIS,...", help="compile for each shape of a mesh of these axes, and show the best")
    add("--limit", metavar="N", type=int, help="with --search, the most shapes to compile")
    add("--diff", metavar="FILE", nargs=2, help="what changed from one saved report, or HLO text, to another")
    files = parser.add_argument_group("files to write")
    files.add_argument("--html", metavar="FILE", help="write a self-contained page")
    files.add_argument("--json", metavar="FILE", help="write the report, or a list of them for several targets")
    files.add_argument("--trace", metavar="FILE", help="write Chrome trace events, for ui.perfetto.dev")
    files.add_argument("--plot", metavar="FILE", help="picture of time and memory over the targets")
    limits = parser.add_argument_group("limits", "when one is passed, the exit status is 1")
    for name, kind, metavar, what in (
        ("--fail-if-exposed", arguments.percent, "PERCENT", "of the wire time is exposed"),
        ("--fail-if-waiting", arguments.percent, "PERCENT", "of a step is spent waiting for the wire"),
        ("--max-time", arguments.duration, "TIME", "such as 12ms is the time of a step"),
        ("--max-memory", arguments.memory, "PERCENT|SIZE", "of a device's memory (90%%), or bytes (28GiB), are needed"),
    ):
        limits.add_argument(name, metavar=metavar, type=kind, help=f"fail when more than this {what}")
    limits.add_argument("--baseline", metavar="FILE", help="fail when worse than this saved report")
    limits.add_argument(
        "--tolerance", metavar="PERCENT", type=arguments.percent, default=0.03, help="what --baseline allows (3%%)"
    )
    add("--timeout", metavar="SECONDS", type=arguments.positive, help="give up after so long")
    add(
        "--memory",
        metavar="GIB",
        type=arguments.gib,
        help="give up when it takes more of this machine's memory (Linux; from 1)",
    )
    add(
        "--in-process",
        action="store_true",
        help="no process of its own, which otherwise bears it when a compiler dies; no --timeout or --memory then",
    )


def main(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit status: 0, 1 when a limit is passed, 2 after an error."""
    if args.inspector_command == "targets":
        listing.print_targets(_console())
        return 0
    errors = Console(stderr=True)
    try:
        return _diff(args) if args.diff else _inspect(args, errors)
    except Exception as error:
        if not isinstance(error, (ValueError, ImportError, RuntimeError, OSError)):
            traceback.print_exc()  # the program's own: where in it
        notes = getattr(error, "__notes__", ())
        text = " ".join(words.plain(line) for line in (f"error: {error or type(error).__name__}", *notes))
        errors.print(text, style="red", markup=False, highlight=False)
        return 2


def _inspect(args: argparse.Namespace, errors: Console) -> int:
    """Reports, files, limits."""
    if args.program is None:
        raise ValueError("no PROGRAM, expected MODULE:FUNCTION or a file of HLO text, or --diff with two files")
    baseline = _saved(args.baseline) if args.baseline else None
    limits = gates.Limits(
        args.fail_if_exposed, args.fail_if_waiting, args.max_time, args.max_memory, baseline, args.tolerance
    )
    if args.search:
        reports = _search(args, errors)
        shown = reports[:1]
    else:
        reports = shown = _inspect_all(args, errors)
    for report in shown:
        _console().print(report)
    if args.json:
        text = [report.to_json() for report in reports]
        pathlib.Path(args.json).write_text(text[0] if len(text) == 1 else "[" + ",\n".join(text) + "]")
    if args.html:
        _write_each(shown, args.html, OverlapReport.to_html)
    if args.trace:
        _write_each(shown, args.trace, OverlapReport.to_trace)
    if args.plot:
        plot.plot(shown, args.plot)
    failures = [line for report in shown for line in limits.failures(report)]
    for line in failures:
        errors.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
    return 1 if failures else 0


def _diff(args: argparse.Namespace) -> int:
    """Prints what changed between two files."""
    if args.program is not None:
        raise ValueError(f"PROGRAM {args.program!r} beside --diff, expected the two files of --diff alone")
    before, after = (_saved(name, args.target, args.mesh) for name in args.diff)
    if len(before) == len(after) == 1:
        pairs = [(before[0], after[0])]
    else:
        pairs = [(one, other) for one in before for other in after if one.target == other.target]
    if not pairs:
        raise ValueError(f"{args.diff[0]} and {args.diff[1]} have no target in common, expected reports of the same")
    found = [inspector.diff(*pair) for pair in pairs]
    for one in found:
        _console().print(one)
    if args.json:
        records = [one.to_dict() for one in found]
        pathlib.Path(args.json).write_text(json.dumps(records[0] if len(records) == 1 else records, indent=2))
    return 0


def _saved(name: str, target: str | None = None, mesh: str | None = None) -> list[OverlapReport]:
    """The reports of a file of JSON; or with a target, of HLO text."""
    text = pathlib.Path(name).read_text()
    try:
        if not text.lstrip().startswith(("{", "[")):
            axes = arguments.mesh_axes(mesh, machines.target(target)) if target else None
            return [inspector.inspect(text + "\n", target=target, mesh=axes)]
        found = record.load(text)
        if isinstance(found, list):
            return [OverlapReport.from_json(json.dumps(entry)) for entry in found]
        return [OverlapReport.from_json(text)]
    except ValueError as error:
        error.add_note(f"in {name}")
        raise


def _write_each(reports: list[OverlapReport], name: str, text: Callable[[OverlapReport], str]) -> None:
    """Writes a file a report; of several, each with the target in its name."""
    for report in reports:
        path = pathlib.Path(name)
        if len(reports) > 1:
            path = path.with_stem(f"{path.stem}-{report.target.replace(':', '-')}")
        path.write_text(text(report))


def _console() -> Console:
    """Standard output; a file or a pipe gets lines as wide as the tables need."""
    return Console(width=None if sys.stdout.isatty() else 132)


def _prepare(args: argparse.Namespace) -> None:
    """What has to be said before JAX starts."""
    if args.kernels:
        kernels.request()
    if args.target and not jax.config.jax_platforms and "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")  # nothing runs, so nothing is looked for


def _inspect_all(args: argparse.Namespace, console: Console) -> list[OverlapReport]:
    _prepare(args)
    reports = []
    text = sys.stdin.read() + "\n" if args.program == "-" else ""  # a line break: text, not the name of a file
    with console.status("starting") as status:
        for name in args.target.split(",") if args.target else [None]:
            machine = machines.target(name) if name else machines.present(jax.devices())
            axes: Any = arguments.mesh_axes(args.mesh, machine)
            if args.program == "-" or pathlib.Path(args.program).is_file():  # text needs no compiler, so no devices
                mesh, program, values = axes, text or pathlib.Path(args.program), ()
            else:
                mesh = machine.mesh(axes)
                program, *values = arguments.program(args.program, args.arg, mesh)
            report = inspector.inspect(
                program, *values, target=machine.name, mesh=mesh, kernels=args.kernels, progress=status.update
            )
            reports.append(dataclasses.replace(report, model_flops=args.model_flops))
    return reports


def _search(args: argparse.Namespace, errors: Console) -> list[OverlapReport]:
    """Prints the best shapes of a mesh; returns their reports, the best first."""
    if not args.target or "," in args.target or args.mesh or args.kernels:
        raise ValueError("--search needs one --target and takes no --mesh and no --kernels: it makes the meshes itself")
    _prepare(args)
    bar = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*bar, console=errors, disable=not errors.is_terminal, transient=True) as progress:
        task = progress.add_task("starting", total=None)
        trials = inspector.search(
            lambda mesh: arguments.program(args.program, args.arg, mesh),
            args.target,
            args.search.split(","),
            limit=args.limit,
            progress=lambda done, total, what: progress.update(task, completed=done, total=total, description=what),
        )
    _console().print(tables.trials(trials))
    reports = [trial.report for trial in trials if trial.report is not None]
    if not reports:
        raise ValueError("the program compiles for no shape of the mesh, expected one: see the reasons above")
    return [dataclasses.replace(report, model_flops=args.model_flops) for report in reports]


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(prog="ringmoe")
    _commands = _parser.add_subparsers(required=True)
    for _name in ("inspect", "targets"):
        add_arguments(_commands.add_parser(_name), _name)
    sys.exit(main(_parser.parse_args()))
