"""What the walk through a schedule writes down."""

import dataclasses


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
    """A piece of a timeline, microseconds from the start of its computation; `lane` is "compute",
    "wire" or "wait"."""

    lane: str
    name: str
    start: float
    end: float


@dataclasses.dataclass
class Timeline:
    """One execution of one computation; `own_us` is its compute outside of loops, branches and
    calls."""

    computation: str
    us: float = 0.0
    compute_us: float = 0.0
    own_us: float = 0.0
    trip_count: float = 1
    counted: bool = True
    spans: list[Span] = dataclasses.field(default_factory=list)
    collectives: list[Collective] = dataclasses.field(default_factory=list)
