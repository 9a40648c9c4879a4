"""What the TPU attention kernels share: the blocks of a call, the walk over a block, and the product they are made of."""

import dataclasses
import itertools
import math

import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ringmoe.interface import AttentionSpec
from ringmoe.pallas.logits_tpu import LANES, Tile

SUBLANES = 16  # of packed bfloat16; float32 needs 8, and takes the same blocks
WIDE = 256  # above this head dim blocks are smaller; float32 at 256 needs 32 MiB of VMEM beside dq


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles of one kernel: upper bounds, from which blocks that divide the shapes are chosen.

    block_q, block_k: queries and keys of one grid step.
    chunk: keys scored at once.
    ahead: chunks scored before the first softmax, and always as many before the next one.
    resident_bytes: VMEM for the dq of all queries that one backward call covers; more queries take more calls.
    """

    block_q: int = 512
    block_k: int = 1024
    chunk: int = 256
    ahead: int = 2
    resident_bytes: int = 16 * 2**20

    def __post_init__(self):
        for name, unit in (
            ("block_q", LANES),
            ("block_k", SUBLANES),
            ("chunk", 2 * SUBLANES),
            ("ahead", 1),
            ("resident_bytes", 1),
        ):
            value = getattr(self, name)
            if value < unit or value % unit:
                raise ValueError(f"{name}={value}, expected a positive multiple of {unit}")

    def blocks(self, spec: AttentionSpec, q, k, v) -> tuple[int, int]:
        """(block_q, block_k); of several pieces they divide a piece, else the last one may end after the array."""
        smaller = 1 if max(q.shape[3], v.shape[3]) <= WIDE else 2
        of = lambda length, limit: block_of(length // spec.pieces, limit // smaller, exact=spec.pieces > 1)
        # Mosaic (jaxlib 0.12.0.1) has no product with a single column.
        return of(q.shape[2], self.block_q) if q.shape[2] > 1 else LANES, of(k.shape[2], self.block_k)


DEFAULT = {"forward": Config(), "backward": Config(512, 512, 512)}
"""Where BEST has none: what is best on most, for float32, and on a TPU that nobody told us of."""

BEST = {
    ("v5e", 64, "backward"): Config(512, 1024, 512),
    ("v5e", 256, "forward"): Config(ahead=3),
    ("v5e", 256, "backward"): Config(512, 1024, 256),
    ("v5p", 128, "backward"): Config(512, 1024, 512, ahead=1),
    ("v5p", 256, "forward"): Config(ahead=3),
    ("v6e", 64, "forward"): Config(ahead=3),
    ("v6e", 128, "forward"): Config(chunk=512),
    ("v6e", 256, "forward"): Config(chunk=512),
    ("tpu7x", 64, "forward"): Config(chunk=512),
    ("tpu7x", 128, "forward"): Config(chunk=512),
    ("tpu7x", 256, "forward"): Config(chunk=512),
}
"""By chip, the head dim that the actual ones fit into, and direction, where another than DEFAULT has fewer bundles: printed by
`bench/blocks_tpu.py`."""

RESIDENT = {("v4", 2): 4 * 2**20, ("v4", 4): 2**20}
"""By chip and bytes of a number, where less than `Config.resident_bytes` has room: a v4 has 16 MiB of VMEM in all."""


def best(direction: str, spec: AttentionSpec, q, v) -> Config:
    width = max(q.shape[3], v.shape[3])
    head_dim = next((h for h in (64, 128, 256) if width <= h), None)
    found = None if q.dtype == jnp.float32 or head_dim is None else BEST.get((spec.chip, head_dim, direction))
    found = found or DEFAULT[direction]
    return dataclasses.replace(found, resident_bytes=RESIDENT.get((spec.chip, q.dtype.itemsize), found.resident_bytes))


def walk(config: Config, block_q: int, first, size: int, diagonal: int | None, start, finish) -> None:
    """Calls `finish(c, start(c))` for each tile `c` of so many keys, some starts ahead: the MXU works during the softmax.

    Along a diagonal (see `Pair.run`) a tile has only the queries that see one of its keys.
    """
    if diagonal is None:
        tiles, ahead = _tiles(config, block_q, first, size), config.ahead
    else:
        before = _tiles(config, block_q, 0, diagonal) if diagonal else []
        tiles, ahead = [c._replace(crossed=0) for c in before], config.ahead * max(1, config.chunk // LANES)
        for low in range(0, size - diagonal, LANES):
            tiles.append(Tile(pl.ds(diagonal + low, LANES), pl.ds(low, block_q - low), LANES))
    started = [start(c) for c in tiles[:ahead]]
    for i, c in enumerate(tiles):
        if i + ahead < len(tiles):
            started.append(start(tiles[i + ahead]))
        finish(c, started.pop(0))


def _tiles(config: Config, block_q: int, first, size: int) -> list[Tile]:
    """The first and the last have half as many keys, since nothing else runs beside the first start and the last finish."""
    edges = [0, *range(config.chunk // 2, size - SUBLANES + 1, config.chunk), size]
    at = lambda low: low if isinstance(first, int) else pl.multiple_of(first + low, math.gcd(low, LANES))
    return [Tile(pl.ds(at(low), high - low), pl.ds(0, block_q), block_q) for low, high in itertools.pairwise(edges)]


def dot(a: jax.Array, b: jax.Array, a_dim: int, b_dim: int) -> jax.Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((a_dim,), (b_dim,)), ((), ()))
    return lax.dot_general(a, b.astype(a.dtype), dims, precision=precision, preferred_element_type=jnp.float32)


def lacks(what: str) -> NotImplementedError:
    return NotImplementedError(f"TPU attention kernel: {what}")


def block_of(length: int, limit: int, exact: bool) -> int:
    """A block up to `limit`: the largest in lanes that divides `length`, or, where that is small and needn't be, one whose last
    ends after the array does."""
    if length <= limit:
        return length
    dividing = next((block for block in range(limit, 0, -LANES) if length % block == 0), None)
    if dividing is not None and (exact or dividing >= limit // 2):
        return dividing
    if exact:
        raise lacks(f"{length} tokens, more than {limit} and in no blocks of {LANES}")
    return -(-length // -(-length // limit) // LANES) * LANES


def within(i, needed, num_blocks: int):
    """Block `i` clamped to those needed, so that a skipped step fetches nothing new."""
    first, last = needed
    return jnp.clip(jnp.clip(i, first, last - 1), 0, num_blocks - 1)


def varying_like(tree, *operands: jax.Array):
    """`tree` made to vary over the manual mesh axes that any operand varies over (where shard_map checks that)."""
    axes = frozenset().union(*(jax.typeof(y).mat.varying for y in operands))
    return jax.tree.map(lambda x: lax.pcast(x, tuple(sorted(axes - jax.typeof(x).mat.varying)), to="varying"), tree)


def shape_of(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=jax.typeof(x).mat)


def new(shape: tuple[int, ...], *operands: jax.Array) -> jax.ShapeDtypeStruct:
    """A float32 result that varies over the manual mesh axes that any operand varies over."""
    like = jax.typeof(varying_like(jnp.float32(0), *operands))
    return jax.ShapeDtypeStruct(shape, like.dtype, manual_axis_type=like.mat)


def nbytes(*arrays) -> int:
    return sum(x.size * x.dtype.itemsize for x in arrays)


def row_bytes(*arrays: jax.Array) -> int:
    """Of one token and head."""
    return sum(x.shape[-1] * x.dtype.itemsize for x in arrays)
