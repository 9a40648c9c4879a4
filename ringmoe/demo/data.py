"""Real text that every Python has: the bytes of the standard library's own sources."""

import dataclasses
import pathlib
import sysconfig
from collections.abc import Iterator

import numpy as np

# Left out: what is not the standard library, and its tests (many distributions don't ship them).
EXCLUDED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Windows of T + 1 bytes, [windows, T + 1] uint8: the first T are the input, the last T what comes next."""

    train: np.ndarray
    heldout: np.ndarray


def source_files(root: pathlib.Path | None = None) -> list[pathlib.Path]:
    """The standard library's `.py` files in sorted order; `root` stands for another folder of sources."""
    root = root or pathlib.Path(sysconfig.get_path("stdlib"))
    files = [path for path in root.rglob("*.py") if not EXCLUDED.intersection(path.relative_to(root).parts[:-1])]
    return sorted(files)


def load(length: int, root: pathlib.Path | None = None, heldout_every: int = 16) -> Corpus:
    """Reads the sources and cuts them into windows of `length` + 1 bytes.

    Every `heldout_every`-th file is kept from training, whole: no window shares a byte with one of the other side.
    """
    files = source_files(root)
    heldout = [path for i, path in enumerate(files) if i % heldout_every == heldout_every - 1]
    train = [path for i, path in enumerate(files) if i % heldout_every != heldout_every - 1]
    return Corpus(_windows(train, length, root), _windows(heldout, length, root))


def _windows(files: list[pathlib.Path], length: int, root: pathlib.Path | None) -> np.ndarray:
    text = np.frombuffer(b"\n".join(path.read_bytes() for path in files), np.uint8)
    count = (len(text) - 1) // length  # neighbours share a byte: the last target of one is the first input of the next
    if count < 1:
        raise ValueError(
            f"{len(files)} source files under {root or sysconfig.get_path('stdlib')} hold {len(text)} bytes, expected "
            f"more than {length}; is the standard library installed as .py files?"
        )
    return np.stack([text[i * length : (i + 1) * length + 1] for i in range(count)])


def batches(windows: np.ndarray, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Batches [B, T + 1] int32 for ever: each epoch visits every window once, in an order that `seed` alone decides."""
    if len(windows) < batch_size:
        raise ValueError(f"{len(windows)} windows, expected at least {batch_size=}; use shorter windows or more text")
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(windows))
        for start in range(0, len(windows) - batch_size + 1, batch_size):
            yield windows[order[start : start + batch_size]].astype(np.int32)
