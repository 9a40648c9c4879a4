"""`inspect`: compile for a target if need be, read the schedule, time it."""

import contextlib
import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ringmoe.inspector import kernels as kernel_costs
from ringmoe.inspector import machines, memory, reader
from ringmoe.inspector.axes import Axes
from ringmoe.inspector.clock import Schedule
from ringmoe.inspector.estimate import Roofline
from ringmoe.inspector.report import OverlapReport
from ringmoe.inspector.timeline import Timeline, longest
from ringmoe.inspector.wire import Wire

_OPERATIONS = 100  # of a report: so many that what is left out is each below a hundredth of the run


def inspect(
    program: Any,
    *args: Any,
    target: str | None = None,
    mesh: Mapping[str, int] | Mesh | None = None,
    kernels: bool = False,
    progress: Callable[[str], None] | None = None,
    **kwargs: Any,
) -> OverlapReport:
    """What a program costs on a machine that need not be here, and whether its communication is
    hidden.

    Args:
      program: a function, jitted or not; a lowered or compiled object; HLO text, or a
        `pathlib.Path` (or one-line string) of a file of it.
      *args, **kwargs: for a function only: arrays or `jax.ShapeDtypeStruct`s. A `NamedSharding` on
        them may be on any mesh that has the axis names of `mesh`: its partition spec is kept and
        its devices replaced.
      target: a name of `ringmoe.targets()`. None is the devices that args or the compiled program
        are on; text needs one.
      mesh: axis sizes over the target's devices, {"data": 2, "seq": 32}, or a Mesh of them; default
        is the mesh of the args' shardings when it has the target's size, else one axis "devices".
      kernels: also read the static cost of each Pallas kernel from the compiler's dumps.
      progress: called with a line when a step begins.

    Returns:
      OverlapReport, per device and run; of a program too large for the device's memory too, as far as the compiler
      came: it then says what is alive at the peak.

    Raises:
      ValueError: text that is not scheduled HLO, an unknown target, a mesh whose size is not the
        target's, no target for text, arguments for a program that is compiled already.
      Exception: what compiling raised, with a note that names the target, or asks for it.
    """
    say = progress or (lambda line: None)
    _check(program, len(args) + len(kwargs))
    with contextlib.ExitStack() as stack:
        dumps = None
        if kernels:
            of_gpus = target is not None and machines.target(target).kind == "gpu"
            dumps = stack.enter_context(kernel_costs.dumping(tpu=not of_gpus))
        started = time.perf_counter()
        if isinstance(program, (str, os.PathLike)):
            built, machine, grid = _Built(_read(program)), *_machine_for_text(target, mesh)
        elif _is_stage(program):
            say("compiling")
            built = _build(program) if hasattr(program, "compile") else _Built(program.as_text(), program)
            machine, grid = _machine_of(built, target, mesh)
        else:
            machine, grid, (args, kwargs) = arrange(target, mesh, (args, kwargs))
            say(f"compiling for {machine.name}")
            built = _compile(program, args, kwargs, machine, grid)
        seconds = time.perf_counter() - started if built.lowered or built.executable else None
        say("reading the schedule")
        module = reader.parse(built.text)
        report = _report(built, module, machine, grid, seconds)
        if dumps is None:
            return report
        names = frozenset(_pallas_tpu_kernels(module)) if built.executable is not None else frozenset()
        return dataclasses.replace(report, kernels=kernel_costs.read(dumps, names))


@dataclasses.dataclass(frozen=True)
class _Built:
    """A compiled program as far as there is one: its text, the executable, what it was compiled from, and what the
    compiler says of its memory when it was too much."""

    text: str
    executable: Any = None
    lowered: Any = None
    dump: memory.Dump | None = None
    available: int | None = None


def _build(lowered: Any) -> _Built:
    """Compiles; a program that does not fit the device's memory as far as the compiler goes."""
    try:
        executable = lowered.compile()
        return _Built(executable.as_text(), executable, lowered)
    except jax.errors.JaxRuntimeError as error:
        dump = memory.dump(lowered) if memory.lacks_memory(error) else None
        if dump is None:
            raise
        return _Built(dump.text, None, lowered, dump, memory.available(error))


def _check(program: Any, num_arguments: int) -> None:
    """Raises ValueError for a program of no known kind, or arguments that nothing takes."""
    is_text = isinstance(program, (str, os.PathLike))
    if not (is_text or _is_stage(program) or callable(program)):
        raise ValueError(
            f"program is a {type(program).__name__}, expected a function, a lowered or compiled "
            "object, HLO text or the path of a file of it"
        )
    if (is_text or _is_stage(program)) and num_arguments:
        raise ValueError(
            f"{num_arguments} arguments for a program that is compiled already, expected none: "
            "pass the function to compile it for them"
        )


def _pallas_tpu_kernels(module: reader.Module) -> list[str]:
    """HLO names of the Pallas kernels in the program."""
    return [
        i.name
        for c in module.computations.values()
        for i in c.instructions
        if i.opcode == "custom-call" and i.target == "tpu_custom_call"
    ]


def _report(
    built: _Built, module: reader.Module, machine: machines.Target, grid: Mesh | None, seconds: float | None
) -> OverlapReport:
    """Reads and times a schedule."""
    printed_by = reader.platform(built.text)
    if printed_by not in ("", machine.kind):
        raise ValueError(
            f"the program was compiled for a {printed_by.upper()}, target {machine.name!r} is a {machine.kind.upper()}: "
            "pass the target that it was compiled for, or compile it for this one"
        )
    if module.num_devices > machine.num_devices:
        raise ValueError(
            f"the program is for {module.num_devices} devices, target {machine.name!r} has "
            f"{machine.num_devices}: pass the target and mesh it was compiled for"
        )
    coords = machine.coords(list(grid.devices.flat) if grid is not None else None)
    slices: list[list[int]] = []
    if module.num_devices <= machine.domain:  # the program of one slice, which all slices run
        domains = [place[0] for place in coords]
        slices = [[i for i, domain in enumerate(domains) if domain == one] for one in sorted(set(domains))]
        coords = [coords[i] for i in slices[0]]
    roofline = Roofline(module, machine)
    shape = {str(name): size for name, size in grid.shape.items()} if grid is not None else {}
    schedule = Schedule(module, roofline, Wire(machine, coords), Axes(shape, slices))
    timelines = tuple(schedule.timelines.values())
    entry = schedule.timelines[module.entry.name]
    collectives = tuple(c for timeline in timelines for c in timeline.collectives)
    counted = [c for c in collectives if c.counted]
    running = [timeline for timeline in timelines if timeline.counted]
    oversize = _oversize(built, module, machine)
    return OverlapReport(
        program=module.name,
        target=machine.name,
        mesh=shape,
        num_devices=machine.num_devices,
        collectives=collectives,
        us=entry.us,
        compute_us=entry.compute_us,
        wire_us=sum(c.wire_us * c.trip_count for c in counted),
        exposed_us=sum(c.exposed_us * c.trip_count for c in counted),
        flops=sum(timeline.flops * timeline.trip_count for timeline in running),
        peak_flops=machine.matmul_flops["bf16"],
        bound_us=_bound_us(running),
        operations=longest(timelines, _OPERATIONS),
        peak_bytes=oversize.needed_bytes if oversize else memory.peak(built.executable),
        hbm_bytes=machine.hbm_bytes,
        memory=memory.parts(built.executable),
        unestimated=roofline.unestimated,
        unknown_loops=tuple(schedule.unknown_loops),
        choices=tuple(schedule.choices),
        xla_optimal_us=_optimal_us(built.executable),
        once_us=sum(timeline.own_us for timeline in timelines),
        timelines=timelines,
        compile_seconds=seconds,
        oversize=oversize,
    )


def _bound_us(timelines: list[Timeline]) -> dict[str, float]:
    """Time over the run by the roof that it touches."""
    total: dict[str, float] = {}
    for timeline in timelines:
        for bound, us in timeline.bound_us.items():
            total[bound] = total.get(bound, 0.0) + us * timeline.trip_count
    return total


def _oversize(built: _Built, module: reader.Module, machine: machines.Target) -> memory.Oversize | None:
    """What does not fit: XLA:TPU gave up, or the peak is above the device's memory, where any size compiles."""
    if built.dump is not None:
        return built.dump.oversize(module, built.available or machine.hbm_bytes)
    peak = memory.peak(built.executable)
    if peak is None or machine.kind == "tpu" or peak <= machine.hbm_bytes:
        return None
    dump = memory.dump(built.lowered) if built.lowered is not None else None
    found = dump.oversize(module, machine.hbm_bytes) if dump else memory.Oversize(peak, machine.hbm_bytes)
    return dataclasses.replace(found, needed_bytes=peak)


def _is_stage(program: Any) -> bool:
    """Whether it is what `jax.jit(f).lower(...)` or `.compile()` returns."""
    return hasattr(program, "as_text") and (hasattr(program, "compile") or hasattr(program, "memory_analysis"))


def _read(program: str | os.PathLike) -> str:
    """The HLO text itself, or that of the file."""
    if isinstance(program, str) and ("\n" in program or program.startswith("HloModule")):
        return program
    if not os.path.isfile(program):
        raise ValueError(
            f"{str(program)[:80]!r} is neither HLO text nor a file, expected what "
            "`compiled.as_text()` returns "
            "or the path of a file of it"
        )
    return pathlib.Path(program).read_text(encoding="utf-8", errors="replace")


def _machine_for_text(target: str | None, mesh: Any) -> tuple[machines.Target, Mesh | None]:
    if target is None:
        raise ValueError(
            "target=None for HLO text, which does not name its machine: pass target=, one of ringmoe.targets()"
        )
    machine = machines.target(target)
    return machine, _grid(machine, mesh) if mesh is not None else None


def _machine_of(built: _Built, target: str | None, mesh: Any) -> tuple[machines.Target, Mesh | None]:
    """Target and mesh of a compiled program: those asked for, else those of its own shardings."""
    if built.executable is None and target is None:
        raise ValueError(
            "the program does not fit its devices' memory, and does not say which they are before it is compiled: "
            "pass target=, one of ringmoe.targets(), and mesh= for a report"
        )
    compiled = built.executable
    shardings = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings)) if compiled is not None else []
    own = next(
        (s.mesh for s in shardings if isinstance(s, NamedSharding) and isinstance(s.mesh, Mesh)),
        None,
    )
    if target is not None:
        machine = machines.target(target)
        grid = _grid(machine, mesh) if mesh is not None else own
        return machine, grid if grid is not None and grid.size == machine.num_devices else None
    devices = (
        list(own.devices.flat)
        if own is not None
        else sorted(next((s.device_set for s in shardings), set(jax.devices()[:1])), key=lambda d: d.id)
    )
    return machines.present(devices), own


def _machine_for(target: str | None, mesh: Any, arguments: Any) -> tuple[machines.Target, Mesh]:
    """Target and mesh to compile a function for."""
    leaves = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(arguments)]
    own = next((s.mesh for s in leaves if isinstance(s, NamedSharding) and s.mesh.size), None)
    if target is None:
        on = own if isinstance(own, Mesh) else mesh if isinstance(mesh, Mesh) else None
        machine = machines.present(list(on.devices.flat) if on is not None else jax.devices())
        if on is not None and (mesh is None or mesh is on):
            return machine, on
    else:
        machine = machines.target(target)
        if mesh is None and isinstance(own, Mesh) and set(own.devices.flat) == set(machine.devices()):
            return machine, own
    if mesh is None and own is not None and own.size == machine.num_devices:
        mesh = dict(own.shape)
    kinds = dict(zip(own.axis_names, own.axis_types, strict=True)) if own is not None else {}
    return machine, _grid(machine, mesh, kinds)


def _grid(machine: machines.Target, mesh: Any, kinds: Mapping[str, AxisType] | None = None) -> Mesh:
    """The mesh itself, or one of these axis sizes over the target's devices."""
    if isinstance(mesh, Mesh):
        if mesh.size != machine.num_devices:
            raise ValueError(
                f"mesh {dict(mesh.shape)} has {mesh.size} devices, expected {machine.num_devices} "
                "for target "
                f"{machine.name!r}: change an axis or the target"
            )
        return mesh
    names = tuple(mesh) if mesh is not None else ("devices",)
    return machine.mesh(mesh, axis_types=tuple((kinds or {}).get(name, AxisType.Auto) for name in names))


def arrange(target: str | None, mesh: Any, arguments: Any) -> tuple[machines.Target, Mesh, Any]:
    """Machine and mesh that `inspect` means by its words, and the arguments, any pytree, with their shardings moved there."""
    machine, grid = _machine_for(target, mesh, arguments)

    def place(leaf: Any) -> Any:
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            return leaf
        sharding = getattr(leaf, "sharding", None)
        spec = sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()
        names = {
            name
            for part in spec
            if part is not None
            for name in (part if isinstance(part, tuple) else (part,))
            if isinstance(name, str)
        }
        if not names <= set(grid.axis_names):
            raise ValueError(
                f"an argument is sharded over {sorted(names)}, the mesh for target "
                f"{machine.name!r} has axes "
                f"{list(grid.axis_names)}: pass mesh={{...}} with those names"
            )
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(grid, spec))

    return machine, grid, jax.tree.map(place, arguments)


def _compile(function: Any, args: Any, kwargs: Any, machine: machines.Target, grid: Mesh) -> _Built:
    """Compiles for the mesh that the arguments are on."""
    lower = getattr(function, "lower", None) or jax.jit(function).lower
    try:
        with jax.set_mesh(grid):
            return _build(lower(*args, **kwargs))
    except Exception as error:
        error.add_note(
            f"while compiling {getattr(function, '__name__', 'the function')} for target "
            f"{machine.name!r}, mesh "
            f"{dict(grid.shape)}"
        )
        raise


def _optimal_us(compiled: Any) -> float | None:
    """XLA's `optimal_seconds`, which XLA:TPU gives."""
    analysis = compiled.cost_analysis() if compiled is not None else None
    analysis = analysis[0] if isinstance(analysis, list) and analysis else analysis
    seconds = analysis.get("optimal_seconds") if isinstance(analysis, dict) else None
    return seconds * 1e6 if seconds is not None and seconds > 0 else None
