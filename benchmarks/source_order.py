"""Times a source's own order: an epoch's index, windows looked up, permutations. Prints medians, asserts nothing.

python benchmarks/source_order.py [--documents 10000000] [--repeats 5]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

from megatron.data.epoch_index import SourceOrder
from megatron.data.native import backend_name
from megatron.data.permutation import permute, permute_range
from megatron.data.source_stream import SourceStream, initial_state

SEQ_LENGTH = 2048
PIECE_TOKENS = 8 * SEQ_LENGTH


class SyntheticFile:
    """Documents with lengths of a web corpus's spread (log-normal, median 600 tokens) and no tokens."""

    def __init__(self, documents: int) -> None:
        lengths = np.random.default_rng(0).lognormal(np.log(600), 1.0, documents)
        self._lengths = np.clip(lengths, 1, 1 << 20).astype(np.int32)
        self.document_count = documents
        self.fingerprint = f"synthetic {documents}"

    def document_lengths(self) -> npt.NDArray[np.integer]:
        return self._lengths

    def tokens(self, document: int, start: int, end: int) -> npt.NDArray[np.integer]:
        raise NotImplementedError("this file has no tokens")


def middle(repeats: int, work: Callable[[], object]) -> float:
    """Median seconds of a call."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def index_build(file: SyntheticFile, cache: Path, repeats: int) -> list[tuple[str, str]]:
    """A source opened for the first time, its first epoch built and published; then opened again."""

    def first(number: int) -> SourceOrder:
        order = SourceOrder([file], seed=number, piece_tokens=PIECE_TOKENS, cache_dir=cache)
        order.prepare(0)
        return order

    numbers = iter(range(repeats))
    built = middle(repeats, lambda: first(next(numbers)))
    opened = middle(repeats, lambda: first(0))
    (size, *_) = (path.stat().st_size for path in cache.iterdir())
    return [
        ("lengths scanned, index built and published", f"{built * 1e3:.1f} ms, {size / 1e6:.2f} MB"),
        ("lengths scanned, index found, verified and mapped", f"{opened * 1e3:.1f} ms"),
    ]


def lookups(file: SyntheticFile, cache: Path, repeats: int) -> list[tuple[str, str]]:
    """Windows at random places, samples in order, samples in order by thousands, and seeking."""
    order = SourceOrder([file], seed=0, piece_tokens=PIECE_TOKENS, cache_dir=cache)
    order.prepare(0)
    count = min(2000, order.epoch_tokens // SEQ_LENGTH)
    places = np.random.default_rng(1).integers(0, order.epoch_tokens - SEQ_LENGTH, count).tolist()
    one = SourceStream(order, initial_state())
    many = SourceStream(order, initial_state())
    far = SourceStream(order, initial_state())
    windows = middle(repeats, lambda: [order.pieces_at(0, place, SEQ_LENGTH) for place in places]) / count
    samples = middle(repeats, lambda: [one.take(SEQ_LENGTH, SEQ_LENGTH) for _ in range(count)]) / count
    rows = middle(repeats, lambda: many.take_rows(count * SEQ_LENGTH, SEQ_LENGTH)) / count
    seek = middle(repeats, lambda: far.skip(10**9, SEQ_LENGTH))
    spans = len(many.take_rows(count * SEQ_LENGTH, SEQ_LENGTH)) / count
    return [
        (f"pieces_at, a window of {SEQ_LENGTH} at a random place", f"{windows * 1e6:.2f} µs"),
        (f"take, a sample of {SEQ_LENGTH} ({spans:.1f} spans)", f"{samples * 1e6:.2f} µs"),
        (f"take_rows, {count} samples at once, each", f"{rows * 1e6:.2f} µs"),
        ("skip of 1e9 samples", f"{seek * 1e6:.2f} µs"),
    ]


def permutations(repeats: int) -> list[tuple[str, str]]:
    """The permutation of 10 million by itself."""
    n, count = 10_000_000, 1 << 20
    indices = np.random.default_rng(2).integers(0, n, count)
    in_order = middle(repeats, lambda: permute_range(0, count, n, 7)) / count
    scattered = middle(repeats, lambda: permute(indices, n, 7)) / count
    single = middle(repeats, lambda: [permute(index, n, 7) for index in range(10_000)]) / 10_000
    return [
        ("permute_range, each", f"{in_order * 1e9:.1f} ns"),
        ("permute of an array, each", f"{scattered * 1e9:.1f} ns"),
        ("permute of one integer", f"{single * 1e9:.0f} ns"),
    ]


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    file = SyntheticFile(arguments.documents)
    print(f"{arguments.documents:,} documents, {int(file.document_lengths().sum()):,} tokens; {backend_name()}")
    with tempfile.TemporaryDirectory() as folder:
        rows = index_build(file, Path(folder), arguments.repeats)
        rows += lookups(file, Path(folder), arguments.repeats)
    for name, figure in rows + permutations(arguments.repeats):
        print(f"  {name:<52} {figure}")


if __name__ == "__main__":
    main()
