"""What the walk through a schedule writes down."""

import dataclasses
import heapq
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange of the program. Times and bytes are of one execution on one device.

    Attributes:
      name: the HLO instruction's.
      kind: HLO opcode without -start, or "remote-dma" for a Pallas kernel that moves data itself.
      asynchronous: whether the program goes on while it runs.
      wire_bytes: bytes that one device sends.
      trip_count: how often it runs in the whole program (product over nested loops), on average where
        runs of a loop differ.
      hidden_by: the longest instructions that compute between start and done, longest first.
      wire_us: time on the wire alone, microseconds.
      compute_us: compute that stands between its start and its done, microseconds.
      exposed_us: how long the program waits for it, microseconds.
      loop: computation it is in; route: ring or line, neighbours or hops; op_name: where in the JAX
        code.
      counted: False in a branch that is not the slowest of its conditional.
      source: "file:line" of the JAX code, when the text tells.
      axes: mesh axes that it goes over, when the mesh is known.
      hidden_by_ops: where in the JAX code each of `hidden_by` is.
    """

    name: str
    kind: str
    asynchronous: bool
    wire_bytes: float
    trip_count: float
    hidden_by: tuple[str, ...]
    wire_us: float
    compute_us: float
    exposed_us: float
    loop: str = ""
    route: str = ""
    op_name: str = ""
    counted: bool = True
    source: str = ""
    axes: tuple[str, ...] = ()
    hidden_by_ops: tuple[str, ...] = ()

    @property
    def total_us(self) -> float:
        """Exposed time over all its executions."""
        return self.exposed_us * self.trip_count * self.counted


@dataclasses.dataclass(frozen=True)
class Operation:
    """An instruction that takes time of the device's own, or that the device waits for.

    Attributes:
      name, opcode: the HLO instruction's; of a wait, the collective's name and kind.
      bound: the roof that it touches: "matrix", "vector", "memory"; or "wire", for a wait.
      us: time of one execution, microseconds; of a wait, what is exposed.
      flops: matmul FLOPs of one execution.
      trip_count: how often it runs in the whole program. counted: as of a `Collective`.
      computation: which it is in; op_name: where in the JAX code; source: "file:line", or "".
    """

    name: str
    opcode: str
    bound: str
    us: float
    flops: float = 0.0
    trip_count: float = 1
    counted: bool = True
    computation: str = ""
    op_name: str = ""
    source: str = ""

    @property
    def total_us(self) -> float:
        """Time over all its executions."""
        return self.us * self.trip_count * self.counted


@dataclasses.dataclass(frozen=True)
class Choice:
    """A conditional whose branches differ. Its time is that of the slowest, so the program's is an
    upper bound; what the others send is listed, not counted.

    Attributes:
      name: the HLO instruction's; loop: computation it is in; trip_count: how often it runs.
      branches: (computation, microseconds, microseconds of wire in it) of one run of each, as printed.
      taken: the branch that counts.
    """

    name: str
    loop: str
    branches: tuple[tuple[str, float, float], ...]
    taken: str
    trip_count: float = 1

    @property
    def uncounted(self) -> tuple[str, ...]:
        """Branches that communicate and are not counted."""
        return tuple(name for name, _, wire in self.branches if wire and name != self.taken)


@dataclasses.dataclass(frozen=True)
class Span:
    """A piece of a timeline, microseconds from the start of its computation; `lane` is "compute", "wire" or "wait".
    Of a loop, a branch or a call, the computations `inside` run `times` one after another."""

    lane: str
    name: str
    start: float
    end: float
    inside: tuple[str, ...] = ()
    times: float = 1


@dataclasses.dataclass
class Timeline:
    """One execution of one computation. `own_us` is its compute outside of loops, branches and calls, `flops` the matmul
    FLOPs of that and `bound_us` its time by roof; `operations` are the longest, the sums are of all."""

    computation: str
    us: float = 0.0
    compute_us: float = 0.0
    own_us: float = 0.0
    flops: float = 0.0
    bound_us: dict[str, float] = dataclasses.field(default_factory=dict)
    trip_count: float = 1
    counted: bool = True
    spans: list[Span] = dataclasses.field(default_factory=list)
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    operations: list[Operation] = dataclasses.field(default_factory=list)

    def stamp(self, trip_count: float, counted: bool) -> None:
        """Says how often it runs, and whether that counts, of itself and of all in it."""
        self.trip_count, self.counted = trip_count, counted
        stamp = {"trip_count": trip_count, "counted": counted}
        self.collectives = [dataclasses.replace(c, **stamp) for c in self.collectives]
        self.operations = [dataclasses.replace(o, **stamp) for o in self.operations]


def longest(timelines: Iterable[Timeline], count: int) -> tuple[Operation, ...]:
    """The operations that take most of the whole program, waits for the wire among them."""
    found = [operation for timeline in timelines for operation in (*timeline.operations, *_waits(timeline))]
    return tuple(heapq.nlargest(count, (o for o in found if o.total_us > 0), key=lambda o: o.total_us))


def _waits(timeline: Timeline) -> Iterable[Operation]:
    for c in timeline.collectives:
        yield Operation(c.name, c.kind, "wire", c.exposed_us, 0.0, c.trip_count, c.counted, c.loop, c.op_name, c.source)
