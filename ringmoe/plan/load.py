"""What one device has to do and to send in attention by one plan, and how long a model of the machine says it takes.

    a kernel's call  = max(pairs F / (matmul rate SHARE), pairs VECTOR / vector rate, (B + C) / memory's rate)
                       + EDGE C / memory's rate + LAUNCH
    a hop            = max(its calls, the next block's way here);  their sum where permutes are not asynchronous, and of
                       one that shares links the first, and the way's part that is for the others
    all              = hops, and what moves before and after them, each by itself

between devices, of which some exchanges go over a network (`Load.domains`); for B bytes that the call's tiles fetch and C of
its state, F = 2 H FLOPs a pair and product (`PRODUCTS`). The kernels' constants are fitted to the inspector's times of
them, see bench/README.md.
"""

import dataclasses
import functools

import numpy as np

from ringmoe.masks import Band
from ringmoe.plan.cost import Machine, Span

PRODUCTS = 2, 5  # of a pair of blocks, forward and backward, in kernels of heads that registers suffice for
SHARE = 0.98  # of the matmul rate that a TPU's kernel reaches
VECTOR = (10.4, 21.3)  # its vector operations for a pair, forward and backward
EDGE = 0.2  # of a call's bytes that move before or after its matmuls
PARTLY = 0.35  # at most of all keys, that a causal mask hides and blocks meet nevertheless
LAUNCH = 0.3  # microseconds of a call
BLOCK = 512  # queries that share what is fetched of keys
PASSES = 5  # over the float32 results that are merged, in memory
TOGETHER = 30 * 2**20  # bytes of results that XLA:GPU makes one collective of, where there are several of a kind
LOGITS = (38.0, 110.0)  # bytes that the kernel in plain XLA operations moves for a pair


@dataclasses.dataclass(frozen=True)
class Load:
    """One plan's, of one device of `machine`."""

    kind: str  # of exchange: "local", "ring", "all_gather", "all_to_all" (and a ring of what that leaves), "merge"
    machine: Machine
    band: Band  # Band() where it tells nothing of places
    itemsize: int
    owed_itemsize: int  # of dK and dV on their way; 0 forward
    in_tiles: bool  # by a TPU's kernel
    batch: int
    heads: int  # of a device before anything moves, and so the following
    key_heads: int
    queries: int
    keys: int
    width: int  # head dim, the mean of the keys' and the values'
    size: int  # devices that share the keys
    mesh_size: int
    slices: int
    domains: tuple[int, ...]  # of each of the devices that share the keys, which slice or host it is on
    head_parts: int
    abreast: int  # rings that go round side by side, along the same axes
    joint_parts: int
    hops: int
    ways: int
    parts: int
    own_parts: int
    pieces: int

    @property
    def backward(self) -> bool:
        return self.owed_itemsize > 0

    @property
    def copies(self) -> int:
        """Of each key head, where there are fewer than devices that take some."""
        return max(1, self.head_parts // self.key_heads)

    @property
    def query(self) -> int:
        """Elements of a device's query."""
        return self.batch * self.heads * self.queries * self.width

    @property
    def key(self) -> int:
        """Elements of a device's key, copied as often as it is sent."""
        return self.batch * self.key_heads * self.copies * self.keys * self.width

    @property
    def moved(self) -> tuple[int, int]:
        """How many arrays like the query and like the key move before and after the work."""
        return (3, 4) if self.backward else (2, 2)

    @property
    def remote(self) -> bool:
        """Whether blocks travel by remote DMA: where a TPU's permutes are not under way during other work, and in one slice."""
        machine, devices = self.machine, self.mesh_size
        there = machine.is_limited(devices) and machine.reaches(devices, self.slices)
        return self.walks and self.hops > 1 and there and self.abreast == 1

    @property
    def walks(self) -> bool:
        return self.kind in ("ring", "all_to_all")

    def sent(self) -> int:
        """Bytes, of what has heads and a head dim."""
        sends, returned = 0, 0
        if self.walks and self.size > self.head_parts:
            sends, returned = self.hops - 1, (self.hops - 1) * self.owed_itemsize * (self.hops > 2) + self._home
        if self.kind == "all_gather":
            sends, returned = self.size - 1, (self.size - 1) * self.owed_itemsize
        sent = 2 * self.key * self.ways // self.parts * (sends * self.itemsize + returned)
        queries, keys = self.moved
        sent += (queries * self.query + keys * self.key) // 2 * (self.pieces - 1) * self.itemsize
        if self.head_parts > 1:
            parts = queries * self.query * self.itemsize + 2 * self.key * (self.itemsize + self._returned)
            sent += parts * (self.head_parts - 1) // self.head_parts
        if self.kind == "merge":
            acc, rest = max(4, self.itemsize), self.size // self.joint_parts
            sent += self.query * (self.joint_parts - 1) * (self.itemsize * (1 + self.backward) + acc)
            sent += 2 * self.query * self.joint_parts * acc * (rest - 1) // rest
        return sent

    @property
    def _home(self) -> int:
        """Bytes of an element of dK that a ring sends home: of two hops rounded, by the only one who owes any."""
        rounded = self.backward and self.hops == 2
        return min(self.owed_itemsize, max(2, self.itemsize)) if rounded else self.owed_itemsize

    @property
    def _returned(self) -> int:
        """Bytes of an element of dK that goes back to its tokens: not rounded before its copies are summed."""
        return 0 if not self.backward else self.owed_itemsize if self.copies > 1 else self.itemsize

    def _span(self, devices: int, apart: bool = False) -> Span:
        """Of so many consecutive devices, or of so many `apart`: one of each run of the others."""
        groups = (
            np.reshape(self.domains, (-1, self.size // devices)).T if apart else np.reshape(self.domains, (-1, devices))
        )
        return Span(devices, max(len(np.unique(group)) for group in groups))

    @functools.cached_property
    def us(self) -> float:
        """Microseconds."""
        return self._walked() + self._swapped() + self._split() + self._gathered() + self._merged()

    def gathered_bytes(self) -> float:
        """Of memory for keys and values, and their gradients, of all devices."""
        return 2 * self.size * self.key * (self.itemsize + self.owed_itemsize) if self.kind == "all_gather" else 0

    @property
    def blocks(self) -> int:
        """Of the keys, that a device meets."""
        return self.hops if self.ways == self.parts else 2 * self.hops - 1

    def _calls(self) -> float:
        """All calls of one hop."""
        machine, calls = self.machine, self.blocks * self.parts
        rows = self.batch * self.heads // self.head_parts * self.queries * self.head_parts * self.joint_parts
        keys = self.keys * (self.size if self.kind == "all_gather" else self.head_parts)
        pairs = rows * self._met(keys) / calls
        if not self.in_tiles:
            return self.ways * (pairs * LOGITS[self.backward] / machine.memory + LAUNCH)
        fetched, kept = self._bytes(rows, keys / self.parts)
        flops = PRODUCTS[self.backward] * 2 * self.width * pairs
        work = max(flops / machine.flops / SHARE, pairs * VECTOR[self.backward] / machine.vector)
        return self.ways * (max(work, (fetched + kept) / machine.memory) + EDGE * kept / machine.memory + LAUNCH)

    def _bytes(self, rows: int, keys: float) -> tuple[float, float]:
        """That one call's tiles fetch again and again, and what it reads and writes once."""
        here = rows * self.width
        blocks = max(1, self.queries * self.head_parts * self.joint_parts / BLOCK)
        fetched = 2 * self.batch * self.heads / self.head_parts * keys * self.width * self.itemsize
        if self.backward:
            owed = 4 * self.key * keys / self.keys * self.owed_itemsize
            return here * 2 * self.itemsize * max(1, keys / BLOCK), here * 8 + owed
        return fetched * blocks, here * (self.itemsize + 8)

    def _met(self, keys: int) -> float:
        """Keys that a query meets in all hops, on the device that meets most."""
        total, band = self.blocks * keys, self.band
        if band.right is not None and band.left is not None:
            return min(total, band.left + band.right + 1 + self.machine.block)
        causal = band.right is not None or band.left is not None
        if causal and (self.pieces > 1 or self.head_parts == self.size):
            # A block of each call; on a GPU of the own block's alone, of the others a mask leaves whole chunks.
            calls = self.parts if self.machine.is_gpu else self.blocks * self.parts
            in_part = calls * self.machine.block
            return total / 2 + min(in_part, PARTLY * total)
        return total

    def _walked(self) -> float:
        """The hops, of which each hides the next block's way, where it is long enough."""
        calls, machine = self._calls(), self.machine
        if self.hops == 1:
            return calls
        far, block = machine.apart(self.size, self.abreast), 2 * self.key / self.parts
        crosses = self._span(self.size // self.abreast, apart=True).domains > 1
        # Permutes, of keys and of values, that share a device's network; of which XLA:GPU makes one.
        beyond = crosses * (1 if machine.is_gpu else 2 * self.ways)
        way, owed, home = (
            machine.alone(block * size / machine.link * far, far, crosses * self.ways * block * size, beyond)
            if size
            else 0.0
            for size in (self.itemsize, self.owed_itemsize, self._home)
        )
        # A permute whose links others share takes longer than XLA's scheduler believes, and starts so much too late. Between
        # slices none is under way during other work in a loop.
        held_up = machine.is_limited(self.mesh_size) or (crosses and machine.dims > 0 and self.hops > 2)
        late = 0.0 if self.remote else 1.0 if held_up else 1 - 1 / far
        hop = lambda wire, work: max(work + late * wire, wire)
        if not self.backward:
            return (self.hops - 1) * hop(way, calls) + calls
        own = calls / self.own_parts  # before the loop; the rest of it after, while the last of what is owed goes home
        last = hop(owed, calls) if self.hops > 2 else calls
        return hop(way, own) + (self.hops - 2) * hop(way + owed, calls) + last + hop(home, calls - own)

    def _to_mirror(self, *arrays: int) -> float:
        """Of arrays of so many elements that leave together: XLA:GPU makes one permute of them."""
        machine, span = self.machine, self._span(self.size)  # rings abreast cross the same middle
        half, beyond, size = self.itemsize / 2, int(span.domains > 1), span.within
        one = lambda n: machine.alone(machine.mirror(size, n * half), machine.steps(size), n * half * beyond, beyond)
        return one(sum(arrays)) if machine.is_gpu else sum(map(one, arrays))

    def _swapped(self) -> float:
        """To balanced places and back."""
        if self.pieces == 1:
            return 0.0
        queries, keys = self.moved
        there, back = [self.query] * (queries - 1) + [self.key] * 2, [self.query] + [self.key] * (keys - 2)
        return self._to_mirror(*there) + self._to_mirror(*back)

    def _to_heads(self, sent: float) -> float:
        return self.machine.takes("all-to-all", self._span(self.head_parts), sent)

    def _split(self) -> float:
        """To heads, and back to tokens."""
        if self.head_parts == 1:
            return 0.0
        one, (queries, _) = self._to_heads, self.moved
        back = 2 * one(self.key * self._returned) + 2 * one(0) if self.backward else 0.0  # lse and delta
        return queries * one(self.query * self.itemsize) + 2 * one(self.key * self.itemsize) + back

    def _both(self, kind: str, sent: float, each: float) -> float:
        """A collective of keys and one of values, or one of both, of so many bytes of every device; `each` has a result."""
        one = self.machine.is_gpu and 2 * each <= TOGETHER
        return (2 - one) * self.machine.takes(kind, self._span(self.size), (1 + one) * sent)

    def _to_all(self) -> float:
        return self._both("all-gather", self.key * self.itemsize, self.size * self.key * self.itemsize)

    def _gathered(self) -> float:
        """K and V to all, and their gradients' sums home."""
        if self.kind != "all_gather":
            return 0.0
        sums = self.key * self.owed_itemsize
        return self._to_all() + (self._both("reduce-scatter", self.size * sums, sums) if self.backward else 0.0)

    @property
    def arriving(self) -> float:
        """Microseconds in which query, key and value come to where they are worked on: forward and backward alike."""
        us = self._to_all() if self.kind == "all_gather" else 0.0
        if self.pieces > 1:
            us += self._to_mirror(self.query, self.key, self.key)
        if self.head_parts > 1:
            us += self._to_heads(self.query * self.itemsize) + 2 * self._to_heads(self.key * self.itemsize)
        return us

    def _merged(self) -> float:
        """Queries to all, and the results' sums."""
        if self.kind != "merge":
            return 0.0
        takes, acc, us = self.machine.takes, max(4, self.itemsize), 0.0
        joint, rest = self._span(self.joint_parts), self._span(self.size // self.joint_parts, apart=True)
        if joint.devices > 1:
            us += (1 + self.backward) * takes("all-gather", joint, self.query * self.itemsize)
            us += 2 * self.backward * takes("all-gather", joint, 0)
            us += takes("reduce-scatter", joint, joint.devices * self.query * acc)
        if rest.devices > 1:
            us += takes("all-reduce", rest, self.query * acc)
        whole, rows = self._span(self.size), joint.devices * self.query / self.width * acc
        us += PASSES * joint.devices * self.query * acc / self.machine.memory
        return us + (0.0 if self.backward else takes("all-reduce", whole, rows) + takes("all-gather", whole, 0))
