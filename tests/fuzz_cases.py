"""Cases of the fuzzer: one program as frozen data, and the hypothesis strategy that draws it.

Every operand is drawn on its own: the sharding of the argument, the slice, pad, reshape or transpose between the argument
and the op, and a sharding constraint after it. What shapes, doors and transforms can't have together is never drawn.
"""

import dataclasses
import math
from collections.abc import Callable

import hypothesis.strategies as st

from tests.helpers import AXES

MESHES = ((8,), (2, 4), (4, 2), (2, 2, 2))
FOUND = ("types", "partitioner", "ringmoe.jit", "types under ringmoe.jit")
DOORS = (*FOUND, "manual", "partly manual", "one device")
TRANSFORMS = (
    "forward", "grad", "vmap", "vmap grad", "scan", "scan grad", "remat grad", "jvp", "hvp", "hvp by jvp", "grad outside",
)  # fmt: skip
MAPPED = 2  # length of the dim that vmap or scan runs over

Spec = tuple[tuple[str, ...], ...]  # mesh axes of each dim, major to minor


@dataclasses.dataclass(frozen=True)
class Operand:
    """One operand: what the op takes, and how it is made of the function's argument."""

    name: str
    shape: tuple[int, ...]  # as the op takes it, all devices together
    spec: Spec  # of the argument
    steps: tuple[tuple, ...] = ()  # argument -> operand, in this order: see `apply`
    constraint: Spec | None = None  # of the operand
    manual: Spec = ()  # in_specs of the user's shard_map
    mapped: int | None = None  # the argument's dim that vmap or scan runs over

    @property
    def argument_shape(self) -> tuple[int, ...]:
        shape = self.shape
        for step in reversed(self.steps):
            shape = shape_before(step, shape)
        return shape if self.mapped is None else (*shape[: self.mapped], MAPPED, *shape[self.mapped :])


@dataclasses.dataclass(frozen=True)
class Case:
    """One program. `eval` of its repr gives it back."""

    op: str
    door: str
    mesh: tuple[int, ...]
    devices: tuple[int, ...]
    explicit: bool
    jit: str
    operands: tuple[Operand, ...]
    transform: str = "forward"
    options: tuple[tuple[str, object], ...] = ()
    manual: tuple[str, ...] = ()  # axes of the user's shard_map
    axis_name: tuple[str, ...] = ()
    check_vma: bool = False
    set_mesh: bool = False
    dtype: str = "float32"
    seed: int = 0


def shape_before(step, shape):
    """The shape that `step` turns into `shape`."""
    kind, *args = step
    if kind == "transpose":
        return tuple(shape[args[0].index(i)] for i in range(len(shape)))
    dim, *args = args
    head, length, tail = shape[:dim], shape[dim], shape[dim + 1 :]
    if kind == "slice":
        return (*head, length + sum(args), *tail)
    if kind in ("pad", "concatenate"):
        return (*head, length - args[0], *tail)
    if kind == "join":  # two dims of the argument become one
        return (*head, args[0], length // args[0], *tail)
    return (*head, length * shape[dim + 1], *shape[dim + 2 :])  # split


def chance(draw, percent: int) -> bool:
    return draw(st.integers(0, 99)) >= 100 - percent  # the simplest case has nothing of all that


@dataclasses.dataclass
class Layout:
    """What the operands of one case have in common while they are drawn."""

    draw: Callable
    mesh: dict[str, int]
    explicit: bool
    roles: dict[str, str]  # axis -> letter that most operands follow
    manual: dict[str, str]  # axis of the user's shard_map -> letter it splits, or ""
    order: tuple[str, ...]  # axes, major to minor, that most operands follow
    mapped: frozenset[str]
    scanned: bool
    mapped_axis: str | None  # the mesh axis over which the mapped dim is sharded

    def parts(self, axes) -> int:
        return math.prod(self.mesh[a] for a in axes)

    def manual_spec(self, letters) -> Spec:
        return tuple(tuple(a for a in self.order if self.manual.get(a, "") == same(l)) for l in letters)

    def axes(self, dims, taken=()) -> list[tuple[str, ...]]:
        """Axes for dims, each a string of letters: half of the time where the other operands have them."""
        own = not chance(self.draw, 60)
        order = self.draw(st.permutations(self.order)) if own else self.order
        found: list[tuple[str, ...]] = [()] * len(dims)
        for axis in order:
            if axis in taken:
                continue
            if own and chance(self.draw, 50):
                at = self.draw(st.integers(-1, len(dims) - 1))
            else:
                role = self.manual.get(axis) or self.roles.get(axis, "")
                at = next((i for i, letters in enumerate(dims) if role in map(same, letters)), -1)
            if at >= 0 and dims[at] != "1":
                found[at] = (*found[at], axis)
        return found

    def even(self, axes, lengths) -> list[tuple[str, ...]]:
        """The axes that divide."""

        def kept(axes, length):
            while length % self.parts(axes):
                axes = axes[:-1]
            return axes

        return [kept(a, n) for a, n in zip(axes, lengths)]


def same(letter: str) -> str:
    """Queries and keys are one sequence, query heads and key heads one kind of heads, as far as roles go."""
    return {"s": "t", "n": "k"}.get(letter, letter)


def shape_steps(lay: Layout, letters, shape):
    """One transpose, reshape or none, and the letters and shape before it."""
    if len(shape) < 2 or not chance(lay.draw, 40):
        return (), letters, shape
    joinable = [(i, a) for i, n in enumerate(shape) for a in range(2, n) if n % a == 0]
    kind = lay.draw(st.sampled_from(("split", "split", "transpose", "join") if joinable else ("split", "transpose")))
    if kind == "transpose":
        perm = tuple(lay.draw(st.permutations(range(len(shape)))))
        step = ("transpose", perm)
        letters = tuple(letters[perm.index(i)] for i in range(len(shape)))
    elif kind == "split":
        at = lay.draw(st.sampled_from((0, len(shape) - 2, len(shape) - 2)))
        step = ("split", at, shape[at], shape[at + 1])
        letters = (*letters[:at], letters[at] + letters[at + 1], *letters[at + 2 :])
    else:
        at, major = lay.draw(st.sampled_from(joinable))
        step = ("join", at, major)
        letters = (*letters[: at + 1], *letters[at:])
    return (step,), letters, shape_before(step, shape)


def length_steps(lay: Layout, axes, letters, shape):
    """Steps that give each sharded dim its length where its axes may not divide it, the axes left, and what is uneven."""
    steps, kept, uneven = [], [], []
    for dim, (own, n) in enumerate(zip(axes, shape)):
        parts = lay.parts(own)
        kinds = ("slice", "slice", "pad", "concatenate", "constraint", "drop")
        if n % parts == 0:
            kinds = ("slice",) if chance(lay.draw, 10) and "1" not in letters[dim] else ("none",)
        if lay.explicit and n % parts:
            kinds = ("drop",)
        kind = lay.draw(st.sampled_from(kinds))
        shorter = n // parts * parts
        if kind in ("pad", "concatenate") and (not shorter or (kind == "concatenate" and n > 2 * shorter)):
            kind = "slice"
        if kind == "slice":
            extra = -n % parts or parts
            before = lay.draw(st.sampled_from((0, 0, extra, extra // 2)))
            steps.append(("slice", dim, before, extra - before))
        elif kind in ("pad", "concatenate"):
            steps.append((kind, dim, n - shorter))
        uneven.append(own if kind == "constraint" else ())
        kept.append(lay.even([own], [n])[0] if kind in ("constraint", "drop") else own)
    return tuple(steps), kept, uneven


def operand(lay: Layout, name: str, letters: str, shape) -> Operand:
    """One operand, on its own."""
    letters, shape = tuple(letters), tuple(shape)
    steps, before, length = shape_steps(lay, letters, shape)
    mapped = name in lay.mapped
    shards_map = mapped and lay.mapped_axis and (lay.explicit or chance(lay.draw, 60))
    taken = (lay.mapped_axis,) if shards_map else ()
    axes = lay.axes(before, taken)
    if lay.explicit and steps:  # a sharded dim can't be reshaped there: what is sharded is sharded after it
        axes = [()] * len(axes)
    first, axes, uneven = length_steps(lay, axes, before, length)
    constraint = None
    if any(uneven) and not steps and not first:
        constraint = tuple(u or a for u, a in zip(uneven, axes))
    elif not lay.explicit and chance(lay.draw, 15):
        constraint = tuple(lay.axes(letters, taken))
    if lay.explicit and (steps or lay.manual):
        fixed = lay.manual_spec(letters)
        free = lay.even(lay.axes(letters, (*taken, *lay.manual)), [n // lay.parts(f) for n, f in zip(shape, fixed)])
        constraint = tuple((*f, *a) for f, a in zip(fixed, free))
    at = None
    if mapped:
        at = 0 if lay.scanned else lay.draw(st.integers(0, len(axes)))
        axes.insert(at, taken)
    return Operand(
        name, shape, tuple(axes), (*first, *steps), constraint, lay.manual_spec(letters) if lay.manual else (), at
    )


def layout(draw, letters: str, manual_letters, transform: str, names):
    """The mesh, the door and the roles of the axes: keyword arguments of the case, and the layout."""
    door = draw(st.sampled_from((*FOUND, *DOORS)))  # those that find shardings twice as often
    shape = () if door == "one device" else draw(st.sampled_from(MESHES[1:] if door == "partly manual" else MESHES))
    axes = AXES[: len(shape)]
    explicit = door.startswith("types") or (door.endswith("manual") and draw(st.booleans()))
    jit = "ringmoe.jit" if door.endswith("ringmoe.jit") else "jax.jit"
    if door in ("partly manual", "one device") and draw(st.booleans()):
        jit = "ringmoe.jit"
    inside = {"manual": axes, "partly manual": (draw(st.sampled_from(axes or ("",))),)}.get(door, ())
    manual = {axis: draw(st.sampled_from(manual_letters)) for axis in inside}
    mapped, mapped_axis = (), None
    if "vmap" in transform or "scan" in transform:
        choices = names[1:] if "scan" in transform else names
        mapped = frozenset(draw(st.one_of(st.just(choices), st.sets(st.sampled_from(choices), min_size=1))))
        free = [a for a, n in zip(axes, shape) if n == MAPPED and a not in manual]
        if "vmap" in transform and free and chance(draw, 30):
            mapped_axis = draw(st.sampled_from(free))
    lay = Layout(
        draw, dict(zip(axes, shape)), explicit,
        {a: draw(st.sampled_from(letters)) for a in axes if a not in manual}, manual,
        tuple(draw(st.permutations(axes))), frozenset(mapped), "scan" in transform, mapped_axis,
    )  # fmt: skip
    # Rounding between two layers, or of derivatives of derivatives, has no bound in bf16 that would show a mistake.
    bf16 = transform not in ("scan", "scan grad", "hvp", "hvp by jvp") and chance(draw, 15)
    # JAX asks for the mesh where the gradient of a jitted function of Explicit axes is taken outside.
    needs_mesh = explicit and transform == "grad outside"
    return lay, {
        "door": door, "mesh": shape, "devices": tuple(draw(st.permutations(range(math.prod(shape))))),
        "explicit": explicit, "jit": jit, "transform": transform, "manual": inside,
        "check_vma": draw(st.booleans()) if manual else False,
        "set_mesh": bool(shape) and (needs_mesh or chance(draw, 30)),
        "dtype": "bfloat16" if bf16 else "float32", "seed": draw(st.integers(0, 99)),
    }  # fmt: skip


def multiple(lay: Layout, n: int, letter: str) -> int:
    """n, or the next number of elements that the user's shard_map can cut."""
    parts = lay.parts(a for a, role in lay.manual.items() if role == letter)
    return -(-n // parts) * parts


@st.composite
def attention_cases(draw) -> Case:
    transform = draw(st.sampled_from(TRANSFORMS))
    has = {name: chance(draw, 25) for name in ("bias", "mask", "query_lengths", "key_lengths", "segments")}
    names = ["query", "key", "value", *[n for n in ("bias", "mask") if has[n]]]
    names += [f"{n}_lengths" for n in ("query", "key") if has[f"{n}_lengths"]]
    names += ["query_segments", "key_segments"] * has["segments"]
    lay, common = layout(draw, "bbtttkk h", ("t", "t", "t", "b", "k", ""), transform, tuple(names))
    lengths = st.sampled_from((1, 2, 3, 4, 5, 6, 7, 8, 8, 12, 16, 16, 24))
    b, t = multiple(lay, draw(st.sampled_from((1, 2, 2, 3, 4))), "b"), multiple(lay, draw(lengths), "t")
    s = t if chance(draw, 60) else multiple(lay, draw(lengths), "t")
    k = multiple(lay, draw(st.sampled_from((1, 2, 2, 4))), "k")
    n, h = k * draw(st.sampled_from((1, 2, 2, 3) if k < 4 else (1, 2))), draw(st.sampled_from((2, 4, 8)))
    if transform.startswith("scan"):  # the output is the next layer's query
        s = t if chance(draw, 80) else s
    sizes = {"b": b, "t": t, "s": s, "k": k, "n": n, "h": h, "1": 1}
    letters = {"query": "btnh", "key": "bskh", "value": "bskh", "query_lengths": "b", "key_lengths": "b"}
    letters |= {"query_segments": "bt", "key_segments": "bs"}
    ones = lambda: "".join(l if draw(st.booleans()) else "1" for l in "bnts")
    letters |= {"bias": ones(), "mask": ones()}
    window = draw(st.sampled_from((None, None, None, (3, 0), (4, 1), (0, 2), 2)))
    options = {
        "is_causal": draw(st.booleans()), "local_window_size": window, "return_residual": chance(draw, 40),
        "exchange": draw(st.sampled_from(("auto",) * 5 + ("all_gather", "ring"))),
    }  # fmt: skip
    operands = tuple(whole_keys(operand(lay, x, letters[x], [sizes[l] for l in letters[x]]), lay) for x in names)
    axis_name = tuple(a for a in lay.order if lay.manual.get(a) == "t")
    return Case("attention", operands=operands, options=tuple(options.items()), axis_name=axis_name, **common)


def whole_keys(op: Operand, lay: Layout) -> Operand:
    """Inside a user's shard_map bias, mask and the keys' segments span all keys on every device."""
    at = {"bias": 3, "mask": 3, "key_segments": 1}.get(op.name)
    if at is None or not lay.manual:
        return op
    bare = lambda spec: None if spec is None else (*spec[:at], (), *spec[at + 1 :])
    return dataclasses.replace(op, manual=bare(op.manual), constraint=bare(op.constraint))


def group_size(lay: Layout, x: Operand, num_tokens: int) -> int | None:
    """Mostly one with which every device holds whole groups."""
    spec = x.constraint or (x.spec if x.mapped is None and not x.steps else ((), (), ()))
    axes = [a for a, role in lay.manual.items() if role == "t"] if lay.manual else spec[1]
    local = num_tokens // lay.parts(axes) if num_tokens % lay.parts(axes) == 0 else 1
    sizes = [i for i in range(1, local + 1) if local % i == 0]
    if not lay.manual and chance(lay.draw, 15):
        sizes = [None, *(i for i in range(1, num_tokens + 1) if num_tokens % i == 0)]
    return lay.draw(st.sampled_from(sizes))


@st.composite
def expert_cases(draw) -> Case:
    transform = draw(st.sampled_from(TRANSFORMS))
    names = ["x", "router_weight", "w_in", "w_out"] + ["w_gate"] * draw(st.booleans())
    names += ["token_mask"] * chance(draw, 25)
    lay, common = layout(draw, "bbtttteee dff", ("t", "t", "b", ""), transform, tuple(names))
    axis_name = tuple(a for a in lay.order if lay.manual.get(a) in ("t", "b") and chance(draw, 80))
    lengths = st.sampled_from((1, 2, 3, 4, 6, 7, 8, 8, 12, 16, 16, 24))
    b, t = multiple(lay, draw(st.sampled_from((1, 2, 2, 3, 4))), "b"), multiple(lay, draw(lengths), "t")
    parts = lay.parts(axis_name)
    e = -(-draw(st.sampled_from((2, 3, 4, 4, 6, 8, 8))) // parts) * parts
    d, f = draw(st.sampled_from((2, 4, 8))), draw(st.sampled_from((3, 4, 8)))
    sizes = {"b": b, "t": t, "e": max(e, 2), "d": d, "f": f}
    letters = {
        "x": "btd", "router_weight": "de", "w_in": "edf", "w_gate": "edf", "w_out": "efd", "token_mask": "bt",
    }  # fmt: skip
    operands = []
    for name in names:
        one = operand(lay, name, letters[name], [sizes[l] for l in letters[name]])
        if lay.manual and name.startswith("w_"):
            one = dataclasses.replace(one, manual=(axis_name, (), ()))
            if lay.explicit:
                one = dataclasses.replace(one, constraint=one.manual)
        operands.append(one)
    config = {
        "top_k": draw(st.integers(1, 2)), "capacity_factor": draw(st.sampled_from((None, 0.5, 1.0, 1.25, 2.0))),
        "group_size": group_size(lay, operands[0], t), "renormalize": draw(st.booleans()), "scope": "group",
        "exchange": draw(st.sampled_from(("auto",) * 4 + ("all_to_all", "pieces", "remote"))),
        "activation": draw(st.sampled_from((None, None, "gelu_exact", "relu2"))),
    }  # fmt: skip
    if not lay.manual and chance(draw, 15):
        config |= {"scope": draw(st.sampled_from(("sequence", "global"))), "group_size": None}
    return Case("experts", operands=tuple(operands), options=tuple(config.items()), axis_name=axis_name, **common)


def cases():
    return st.sampled_from((attention_cases, attention_cases, expert_cases)).flatmap(lambda strategy: strategy())
