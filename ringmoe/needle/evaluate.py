"""What is measured: facts at every depth of a haystack, chains of facts, and a cipher; with exact counts."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ringmoe.needle import data
from ringmoe.needle.data import Asked, Stretch
from ringmoe.needle.haystack import Reader
from ringmoe.needle.model import KINDS, Params

DEPTHS = 10  # equal parts of a haystack, in each of which facts lie
CHAINS = (2, 3)  # facts that a question goes through; of three no model was taught


class Trial(NamedTuple):
    """One question, and whether every byte of its answer was right."""

    haystack: str  # the modality of the haystack
    needle: str  # that of the fact; "any" of a chain's
    length: int  # tokens
    depth: int  # 0 .. DEPTHS - 1, the start of the context first; -1: a chain's facts lie anywhere
    links: int  # facts that the answer needs
    right: bool
    said: str
    expected: str


class Cost(NamedTuple):
    """What one haystack took."""

    haystack: str
    length: int
    cache_bytes: int
    prefill_seconds: float
    questions: int
    ask_seconds: float  # all questions, all bytes of the answers


def hide(
    stretch: Stretch, per_depth: int, num_chains: int, rng: np.random.Generator
) -> list[tuple[dict[str, Any], Asked]]:
    """Writes facts over the stretch: `per_depth` of each modality at each depth, `num_chains` of each of CHAINS anywhere.

    Returns what is asked, with the fields of its `Trial` that are known before. No two facts share a key.
    """
    cells = len(stretch.kind) // data.CELL
    bounds = np.linspace(0, cells, DEPTHS + 1).astype(int)
    singles = data.chains(DEPTHS * len(KINDS) * per_depth, 1, rng)
    taken = {made[0][1 : 1 + data.KEY] for made, _ in singles}
    asked, free = [], []

    def place(cell: int, kind: int, one: bytes):
        data.put(stretch, cell * data.CELL + int(rng.integers(data.CELL + 1 - len(one))), kind, one)

    for depth in range(DEPTHS):
        count = per_depth * len(KINDS)
        here = bounds[depth] + rng.choice(bounds[depth + 1] - bounds[depth], bounds[depth + 1] - bounds[depth], False)
        free.extend(here[count : count + 1000])
        for i, ((one,), question) in enumerate(singles[depth * count : (depth + 1) * count]):
            place(here[i], i % len(KINDS), one)
            asked.append(({"needle": KINDS[i % len(KINDS)], "depth": depth, "links": 1}, question))
    rest = iter(rng.permutation(free))
    for links in CHAINS:
        chosen = [c for c in data.chains(4 * num_chains, links, rng) if not taken & {f[1 : 1 + data.KEY] for f in c[0]}]
        for facts, question in chosen[:num_chains]:
            taken |= {f[1 : 1 + data.KEY] for f in facts}
            for one in facts:
                place(next(rest), int(rng.integers(len(KINDS))), one)
            asked.append(({"needle": "any", "depth": -1, "links": links}, question))
    return asked


def measure(
    reader: Reader,
    params: Params,
    lengths: Sequence[int],
    trials: int,
    seed: int,
    told: Callable[[str], None] = lambda line: None,
    kinds: Iterable[int] = range(len(KINDS)),
) -> tuple[list[Trial], list[Cost]]:
    """Recall at each length, in a haystack of each modality.

    Args:
      trials: facts of each modality at each depth, for each length and haystack. A long haystack holds all of them, a short
        one a few: then there are several haystacks. Of chains of each number of links there are as many, or where there is
        room for them four times as many.
      told: is given a line after each haystack.
    """
    done: list[Trial] = []
    costs: list[Cost] = []
    cache = reader.empty()
    for length in lengths:
        per_depth = max(d for d in range(1, trials + 1) if trials % d == 0 and (d == 1 or 2048 * d <= length))
        for kind in kinds:
            for repeat in range(trials // per_depth):
                rng = np.random.default_rng((seed, length, kind, repeat))
                stretch = data.haystack(length, kind, rng)
                asked = hide(stretch, per_depth, per_depth if length < 4096 else 4 * per_depth, rng)
                start = time.perf_counter()
                cache, context = reader.prefill(params, cache, stretch, rng)
                jax.block_until_ready(cache)
                middle = time.perf_counter()
                said = reader.ask(params, cache, context, [question for _, question in asked])
                end = time.perf_counter()
                done.extend(
                    Trial(KINDS[kind], length=length, right=one == question.answer, said=one.decode("latin-1"),
                          expected=question.answer.decode(), **known)
                    for (known, question), one in zip(asked, said)
                )  # fmt: skip
                costs.append(
                    Cost(KINDS[kind], length, reader.cache_bytes(length), middle - start, len(asked), end - middle)
                )
            here = [t for t in done if t.length == length and t.haystack == KINDS[kind]]
            told(
                f"{length:>10,} tokens of {KINDS[kind]:5}: {counted(t.right for t in here if t.links == 1)} facts, "
                + ", ".join(f"{counted(t.right for t in here if t.links == n)} chains of {n}" for n in CHAINS)
                + f"; prefill {costs[-1].prefill_seconds:.1f} s, questions {costs[-1].ask_seconds:.1f} s"
            )
    return done, costs


class Translated(NamedTuple):
    """Words of a cipher that nobody had seen, after contexts of one length."""

    length: int  # tokens
    dictionary: bool  # whether the context held the cipher's dictionary
    letters: int  # that were asked for
    right: int
    words: int
    right_words: int


def translate(
    reader: Reader,
    params: Params,
    lengths: Sequence[int],
    ciphers: int,
    words: int,
    seed: int,
    told: Callable[[str], None] = lambda line: None,
) -> list[Translated]:
    """How much of unseen ciphers is learnt from their dictionaries in a context of mixed modalities, and without them.

    Each of `ciphers` contexts holds the 26 lines of its own cipher's dictionary at any depths, three at a time, in any
    modality; `words` words are asked.
    """
    found = []
    cache = reader.empty()
    for length in lengths:
        for dictionary in (True, False):
            right = np.zeros((ciphers, words, data.WORD), bool)
            for i in range(ciphers):
                rng = np.random.default_rng((seed, length, i))
                stretch = data.haystack(length, None, rng)
                lines, asked = data.cipher(rng, words)
                for cell, line in zip(rng.choice(length // data.CELL, len(lines), False), lines if dictionary else ()):
                    data.put(stretch, int(cell) * data.CELL, int(rng.integers(len(KINDS))), line)
                cache, context = reader.prefill(params, cache, stretch, rng)
                for j, (said, question) in enumerate(zip(reader.ask(params, cache, context, asked), asked)):
                    right[i, j] = [a == b for a, b in zip(said[: data.WORD], question.answer)]
            whole = right.all(-1)
            found.append(Translated(length, dictionary, right.size, int(right.sum()), whole.size, int(whole.sum())))
            what = "given" if dictionary else "withheld"
            told(f"{length:>10,} tokens, dictionary {what}: {found[-1].right}/{right.size} letters")
    return found


def counted(right: Iterable[bool]) -> str:
    right = list(right)
    return f"{sum(right)}/{len(right)}"


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a rate, of `right` of `count` trials, at 95% (Wilson, 1927)."""
    if count == 0:
        return 0.0, 1.0
    rate = right / count
    center = rate + z * z / (2 * count)
    spread = z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    below = 1 + z * z / count
    return max(0.0, (center - spread) / below), min(1.0, (center + spread) / below)
