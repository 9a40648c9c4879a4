"""Generated data: text, rendered images and sound, facts hidden in them, and questions about these facts.

A symbol has three forms: a byte of text; a patch of 8 x 8 pixels with its glyph; a frame of sound, the magnitudes of 64
frequencies, in which it is a chord of two tones (as on a telephone's keys). Patches and frames vary in contrast and are noisy.

    @KQZR:481.      a fact: the secret of KQZR is 481; in text, as glyphs or as chords
    @KQZR:ABCD.     a fact whose value is a key: a link of a chain
    ?KQZR:481.      a question, in text, and its answer; of a chain ?KQZR:ABCD:481.
    #c=p;           a line of a cipher's dictionary
    !ccc=ppp;       a word of that cipher, and what it means
"""

import dataclasses
import functools
import re
import string
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib import font_manager, ft2font

from ringmoe.demo import data as sources
from ringmoe.needle.model import KINDS, SIGNAL, Tokens

LETTERS, DIGITS = (np.frombuffer(s.encode(), np.uint8) for s in (string.ascii_uppercase, string.digits))
LOWER = np.frombuffer(string.ascii_lowercase.encode(), np.uint8)
KEY, VALUE, WORD = 4, 3, 3  # letters of a key, digits of a value, letters of a cipher's word
CELL = 16  # tokens; a fact lies within one cell
NOTHING = 0  # the symbol of a patch or frame that shows none
NOISE = 0.08  # standard deviation; a glyph's pixels and a chord's tones are about 1


class Stretch(NamedTuple):
    """Tokens before they are rendered."""

    kind: np.ndarray  # [T] int8, index into KINDS
    symbol: np.ndarray  # [T] uint8


@functools.cache
def text() -> np.ndarray:
    """The standard library's sources, one after another: about eleven million bytes of ASCII."""
    whole = np.frombuffer(b"\n".join(path.read_bytes() for path in sources.source_files()), np.uint8)
    return whole[(whole < 128) & (whole != NOTHING)]


@functools.cache
def glyphs() -> np.ndarray:
    """[128, SIGNAL] float32: every printable symbol's pixels, 0 to 1, on a line whose base is at the seventh row."""
    font = ft2font.FT2Font(font_manager.findfont("DejaVu Sans Mono:bold"))
    font.set_size(9, 72)
    side = int(SIGNAL**0.5)
    pixels = np.zeros((128, side, side), np.float32)
    for symbol in range(33, 127):
        font.set_text(chr(symbol), 0.0)
        font.draw_glyphs_to_bitmap(antialiased=True)
        image = np.asarray(font.get_image())[-side:, :side] / 255  # what hangs below a line stays
        top = max(0, min(side - len(image), side - 1 - len(image) + round(font.get_descent() / 64)))
        pixels[symbol, top : top + len(image), : image.shape[1]] = image
    return pixels.reshape(128, SIGNAL)


@functools.cache
def chords() -> np.ndarray:
    """[128, SIGNAL] float32: every printable symbol's two tones, one of ten low and one of ten high frequencies."""
    index = np.arange(128)
    energies = np.zeros((128, SIGNAL), np.float32)
    printable = index[33:127]
    energies[printable, 2 + 3 * ((printable - 33) // 10)] = 1.5
    energies[printable, 33 + 3 * ((printable - 33) % 10)] = 1.5
    return energies


def textures(count: int, rng: np.random.Generator) -> np.ndarray:
    """[count, SIGNAL] patches without a symbol: plane waves of any direction, length and phase, on a gray ground."""
    y, x = np.divmod(np.arange(SIGNAL), int(SIGNAL**0.5))
    a, b, phase, gray, height = rng.uniform((-1.5, -1.5, 0, 0, 0), (1.5, 1.5, 6.3, 0.8, 0.6), (count, 5)).T[:, :, None]
    return (gray + height * np.cos(a * x + b * y + phase)).astype(np.float32)


def tones(count: int, rng: np.random.Generator) -> np.ndarray:
    """[count, SIGNAL] frames without a symbol: one resonance of any frequency, width and loudness."""
    center, width, height = rng.uniform((0, 0.5, 0), (SIGNAL, 8, 1.5), (count, 3)).T[:, :, None]
    return (height * np.exp(-(((np.arange(SIGNAL) - center) / width) ** 2))).astype(np.float32)


def render(stretch: Stretch, rng: np.random.Generator, noise: float = NOISE) -> Tokens:
    """What the model sees of a stretch [T]: `Tokens` [T]."""
    kind, symbol = stretch
    signal = np.zeros((len(kind), SIGNAL), np.float32)
    for i, (table, other) in enumerate(((glyphs(), textures), (chords(), tones)), 1):
        (where,) = np.nonzero(kind == i)
        shown = table[symbol[where]] * rng.uniform(0.8, 1.2, (len(where), 1)).astype(np.float32)
        (empty,) = np.nonzero(symbol[where] == NOTHING)
        shown[empty] = other(len(empty), rng)
        signal[where] = shown + noise * rng.standard_normal(shown.shape, np.float32)
    return Tokens(kind.astype(np.int32), np.where(kind == 0, symbol, 0).astype(np.int32), signal)


def as_text(written: bytes) -> Tokens:
    """Bytes of text as `Tokens` [T]."""
    length = len(written)
    symbols = np.frombuffer(written, np.uint8).astype(np.int32)
    return Tokens(np.zeros(length, np.int32), symbols, np.zeros((length, SIGNAL), np.float32))


def haystack(length: int, kind: int | None, rng: np.random.Generator) -> Stretch:
    """A stretch without facts: of one modality, or of pieces of 64 tokens of any (kind None).

    Text is the standard library's; images and sound are that text, rendered, and in every other piece textures and tones.
    """
    whole = text()
    start = rng.integers(len(whole))
    symbol = np.take(whole, np.arange(start, start + length), mode="wrap")
    pieces = -(-length // 64)
    kinds = rng.integers(0, len(KINDS), pieces) if kind is None else np.full(pieces, kind)
    empty = (kinds > 0) & (rng.random(pieces) < 0.5)
    spread = lambda x: np.repeat(x, 64)[:length]
    return Stretch(spread(kinds).astype(np.int8), np.where(spread(empty), NOTHING, symbol).astype(np.uint8))


def joined(*stretches: Stretch) -> Stretch:
    return Stretch(*(np.concatenate(field) for field in zip(*stretches)))


def put(stretch: Stretch, at: int, kind: int, symbols: bytes) -> None:
    """Writes symbols over what is there, in place."""
    stretch.kind[at : at + len(symbols)] = kind
    stretch.symbol[at : at + len(symbols)] = np.frombuffer(symbols, np.uint8)


def keys(count: int, rng: np.random.Generator) -> list[bytes]:
    """Different keys of KEY letters."""
    numbers = rng.choice(len(LETTERS) ** KEY, count, replace=False)
    places = len(LETTERS) ** np.arange(KEY)
    return [row.tobytes() for row in LETTERS[numbers[:, None] // places % len(LETTERS)]]


def digits(rng: np.random.Generator) -> bytes:
    return rng.choice(DIGITS, VALUE).tobytes()


def fact(key: bytes, value: bytes) -> bytes:
    return b"@" + key + b":" + value + b"."


def question(key: bytes) -> bytes:
    return b"\n?" + key + b":"


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question, and the answer that ends it."""

    question: bytes
    answer: bytes


def chains(count: int, links: int, rng: np.random.Generator) -> list[tuple[list[bytes], Asked]]:
    """`count` chains of `links` facts each: the facts, first link first, and the question about the first key."""
    every = keys(count * links, rng)
    made = []
    for i in range(count):
        mine = every[i * links : (i + 1) * links]
        end = digits(rng)
        facts = [fact(key, value) for key, value in zip(mine, [*mine[1:], end])]
        made.append((facts, Asked(question(mine[0]), b":".join([*mine[1:], end]) + b".")))
    return made


def near_miss(key: bytes, rng: np.random.Generator) -> bytes:
    """The key with another letter in one place."""
    place = rng.integers(KEY)
    other = rng.choice(LETTERS[LETTERS != key[place]])
    return key[:place] + bytes([other]) + key[place + 1 :]


def begun(value: bytes, rng: np.random.Generator) -> bytes:
    """A value of the same kind that begins as this one does; nothing, some or all but the last symbol is the same.

    So what follows `KQZR:48` can't be told from `48` alone, as it can among the few facts of a short context.
    """
    same = int(rng.integers(len(value)))
    kind = DIGITS if value[same] in DIGITS else LETTERS
    return value[:same] + rng.choice(kind, len(value) - same).tobytes()


@functools.cache
def lookalikes() -> np.ndarray:
    """Where the library's text has four capitals in a row: what is most like a key among ten million tokens."""
    found = re.finditer(rb"[A-Z]{4}(?![A-Z])", text().tobytes())
    return np.array([one.start() for one in found])


def decoy(one: bytes, rng: np.random.Generator) -> bytes:
    """What looks like the fact and is none: a passage of the library, or capitals and a colon, more or less like its key."""
    if rng.random() < 0.3:
        start = int(rng.choice(lookalikes())) - int(rng.integers(4))
        return text()[max(0, start) : start + 12].tobytes()
    key, value = one[1 : 1 + KEY], one[2 + KEY : -1]
    for _ in range(rng.integers(5)):
        key = near_miss(key, rng)
    before = rng.choice(LETTERS, rng.integers(4)).tobytes() if rng.random() < 0.5 else b" #.("[rng.integers(4) :][:1]
    between = b"::= "[rng.integers(4) :][:1]
    after = (
        begun(value, rng) if rng.random() < 0.5 else rng.choice(np.concatenate([LETTERS, DIGITS, LOWER]), 4).tobytes()
    )
    return before + key + between + after


def recall(cells: int, links: int, rng: np.random.Generator) -> tuple[list[bytes], list[Asked]]:
    """Facts for up to so many cells, in chains of `links`, and others of keys and values like theirs; and the questions."""
    made = chains(max(1, int(rng.integers(cells // 8, cells // 2 + 1)) // links), links, rng)
    facts = [one for one_chain, _ in made for one in one_chain]
    known = {one[1 : 1 + KEY] for one in facts}
    for i in rng.permutation(len(facts))[: cells - len(facts)]:
        key = near_miss(facts[i][1 : 1 + KEY], rng) if rng.random() < 0.5 else keys(1, rng)[0]
        if key not in known:
            known.add(key)
            facts.append(fact(key, begun(facts[i][2 + KEY : -1], rng)))
    return facts, [asked for _, asked in made]


def cipher(rng: np.random.Generator, words: int) -> tuple[list[bytes], list[Asked]]:
    """A cipher nobody has seen: the lines of its dictionary, three to a cell, and words in it."""
    meaning = rng.permutation(LOWER)
    lines = [b"#%c=%c;" % (LOWER[i], meaning[i]) for i in rng.permutation(len(LOWER))]
    cells = [b"".join(lines[i : i + 3]) for i in range(0, len(lines), 3)]
    asked = []
    for _ in range(words):
        word = rng.choice(len(LOWER), WORD)
        asked.append(Asked(b"\n!" + LOWER[word].tobytes() + b"=", meaning[word].tobytes() + b";"))
    return cells, asked


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What batches are made of.

    Args:
      batch: B, sequences. length: T, of which `room` tokens at the end are questions with their answers.
      kinds: facts are of the first so many modalities; contexts are of all.
      cipher, chain: the shares of sequences that teach a cipher, and chains of two facts; the others teach single facts.
      decoys: the share of the other cells that hold what looks like one of the facts and is none.
      noise: of patches and frames, its standard deviation.
    """

    batch: int
    length: int
    room: int
    kinds: int = len(KINDS)
    cipher: float = 0.2
    chain: float = 0.3
    decoys: float = 0.0
    noise: float = NOISE


class Example(NamedTuple):
    """A sequence, or a batch of them, and what is to be learnt from it."""

    tokens: Tokens  # [T]
    shown: Any  # [T] int32, the symbol that a patch or frame shows; -1 of text, and where there is none
    targets: Any  # [room] int32, what follows each of the last tokens where an answer does, else -1


def example(lesson: Lesson, rng: np.random.Generator) -> Example:
    """One sequence to learn from: a context with facts, then questions and answers."""
    context, room = lesson.length - lesson.room, lesson.room
    cells = context // CELL
    if rng.random() < lesson.cipher:
        facts, asked = cipher(rng, room // (2 * WORD + 4))
    else:
        facts, asked = recall(cells, 2 if rng.random() < lesson.chain else 1, rng)
    own = int(rng.integers(len(KINDS))) if rng.random() < 0.6 else None
    stretch = joined(haystack(context, own, rng), haystack(room, 0, rng))
    free = len(facts) if not facts[0].startswith(b"@") else cells
    facts = facts + [decoy(facts[i % len(facts)], rng) for i in range(int(lesson.decoys * (free - len(facts))))]
    for cell, one in zip(rng.permutation(cells), facts, strict=False):
        put(stretch, cell * CELL + int(rng.integers(CELL + 1 - len(one))), int(rng.integers(lesson.kinds)), one)
    targets = np.full(room + 1, -1, np.int32)
    at = 0
    for one in (asked[i] for i in rng.permutation(len(asked))):
        whole = one.question + one.answer
        if at + len(whole) > room:
            break
        put(stretch, context + at, 0, whole)
        targets[at + len(one.question) : at + len(whole)] = np.frombuffer(one.answer, np.uint8)
        at += len(whole)
    shown = np.where((stretch.kind > 0) & (stretch.symbol > 32), stretch.symbol.astype(np.int32), -1)
    return Example(render(stretch, rng, lesson.noise), shown, targets[1:])


def batch(lesson: Lesson, seed: int) -> Example:
    """A lesson's sequences, which the seed alone decides: arrays [B, ...]."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda *rows: np.stack(rows), *(example(lesson, rng) for _ in range(lesson.batch)))
