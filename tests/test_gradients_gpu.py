"""How blocks of threads of a Hopper kernel take turns at dQ: what the GPU does of itself, and no interpreter shows."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from ringmoe.interface import AttentionSpec, Extras, Offsets
from ringmoe.masks import Band, Causal, Chunks, Prefix, Window
from ringmoe.pallas.logits_gpu import Blocks
from ringmoe.pallas.streams_gpu import ROWS, TALL

BANDS = (
    Band(),
    Band(right=0),
    Band(100, 70),
    Band(left=-200),
    Band(20, 0),
    Band.make(True, None, (Window(80, 5) | Prefix(170)) & Chunks(100)),
    Band.make(False, None, Causal() | Prefix(170)),
    Band.make(False, None, Window(80, 5) | Prefix(170)),
)


def laid_out(band, t, s, at, pieces=1, lengths=None):
    """The spans of blocks of keys, [B, blocks of threads, 2], and of each the turns at its blocks of queries."""
    batch = len(lengths or [()])
    of = lambda length: jax.ShapeDtypeStruct((batch, 1, length, 64), jnp.bfloat16)
    lengths = zip(("query_lengths", "key_lengths"), zip(*lengths or ()))
    extras = Extras()._replace(**{name: jnp.asarray(x, jnp.int32) for name, x in lengths})
    blocks, known = Blocks.make(AttentionSpec(0.1, band, pieces=pieces), of(t), of(s), extras, at, ROWS, "key", True)
    found = []
    for b in range(batch):
        spans = [blocks.met(known, b, j) for j in range(blocks.num_rows)]
        turns = [
            {int(first) + n: int(blocks.turn(known, b, j, (int(first) + n) * ROWS)) for n in range(int(met))}
            for j, (first, met) in enumerate(spans)
        ]
        found.append(turns)
    return found


def run(turns, at_once: int):
    """What order blocks of threads add to each block of queries in, so many at a time, as they are started; each goes on as far
    as it can before the next does. Fails where none can."""
    waiting, running, order = list(enumerate(turns)), [], {}
    while waiting or running:
        while waiting and len(running) < at_once:
            j, mine = waiting.pop(0)
            running.append((j, sorted(mine.items(), reverse=True)))
        before = sum(len(left) for _, left in running)
        for j, left in reversed(running):
            while left and len(order.setdefault(left[0][0], [])) >= left[0][1]:
                order[left.pop(0)[0]].append(j)
        assert sum(len(left) for _, left in running) < before, "each waits for another"
        running = [one for one in running if one[1]]
    return order


@given(
    st.sampled_from(BANDS),
    st.integers(1, 12).map(lambda n: n * ROWS),
    st.integers(1, 6).map(lambda n: n * TALL),
    st.lists(st.integers(0, 900), min_size=2, max_size=2),
    st.sampled_from([1, 2]),
    st.one_of(st.none(), st.lists(st.tuples(st.integers(0, 700), st.integers(0, 700)), min_size=1, max_size=2)),
    st.integers(1, 7),
)
@example(Band(20, 0), 640, 768, [0, 700], 1, None, 1)  # the first blocks of keys are seen by nobody
@example(Band(20, 0), 640, 768, [700, 0], 1, None, 1)  # the last ones
@example(Band(), 640, 768, [0, 0], 1, [(0, 0)], 2)
@example(BANDS[-1], 768, 768, [0, 0], 1, None, 6)  # all queries see the first keys, and few the others
def test_every_block_of_threads_gets_its_turn(band, t, s, starts, pieces, lengths, at_once):
    pieces = pieces if t % (pieces * TALL) == s % (pieces * TALL) == 0 else 1
    query, key = (tuple(start + 1000 * piece for piece in range(pieces)) for start in starts)
    at = Offsets(query, key)
    queries, keys = (np.asarray(places.of(jnp.arange(size))) for places, size in zip(at.places(t, s), (t, s)))
    seen = np.broadcast_to(np.asarray(band(jnp.asarray(queries)[:, None], jnp.asarray(keys)[None])), (t, s))
    for b, turns in enumerate(laid_out(band, t, s, at, pieces, lengths)):
        here = seen
        if lengths is not None:
            here = seen & (queries < lengths[b][0])[:, None] & (keys < lengths[b][1])[None]
        order = run(turns, at_once)
        assert all(js == sorted(set(js)) for js in order.values())
        of_pairs = here.reshape(t // ROWS, ROWS, s // TALL, TALL).any((1, 3))
        assert all(j in order.get(i, []) for i, j in np.argwhere(of_pairs))


def test_no_more_is_met_than_must_be():
    """Of a causal mask, and of a window that leaves blocks of keys at either end to nobody."""
    (causal,) = laid_out(Band(right=0), 1024, 1024, Offsets((0,), (0,)))
    assert [sorted(x) for x in causal] == [list(range(2 * j, 16)) for j in range(8)]
    (window,) = laid_out(Band(64, 0), 512, 1024, Offsets((256,), (0,)))
    assert [len(x) for x in window] == [1, 1, 3, 3, 3, 2, 1, 1]
