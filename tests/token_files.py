"""Small stand-ins for opened indexed datasets, and the choice of backend, for tests of a source's own order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from decimal import Decimal
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import strategies as st

from megatron.data.native import native

BACKENDS = ["numpy", "native"]
needs_native = pytest.mark.skipif(native() is None, reason="the C++ extension was not built")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs the block on the NumPy twins, or on the C++ extension."""
    if name == "native":
        if native() is None:
            pytest.skip("the C++ extension was not built")
        yield
        return
    with ExitStack() as patches:
        for module in ("permutation", "holdout", "piece_table", "assembly", "indexed_format"):
            patches.enter_context(patch(f"megatron.data.{module}.native", lambda: None))
        yield


class FakeFile:
    """Documents of given lengths, by default with ids 1000 * document + position, so that a reader can be checked."""

    def __init__(self, lengths: Sequence[int], fingerprint: str = "a", dtype: type = np.int64) -> None:
        self._lengths = np.array(lengths, dtype=dtype)
        self.fingerprint = fingerprint
        self.document_count = len(lengths)

    def document_lengths(self) -> npt.NDArray[np.integer]:
        return self._lengths

    def tokens(self, document: int, start: int, end: int) -> npt.NDArray[np.integer]:
        assert 0 <= start <= end <= self._lengths[document]
        return np.arange(start, end) + 1000 * document


LENGTHS = st.one_of(
    st.lists(st.one_of(st.integers(0, 12), st.integers(0, 70)), max_size=45),
    st.lists(st.integers(1, 30), min_size=8, max_size=45),
)
SLICES = st.sampled_from([("0", "1"), ("0", "1"), ("0.25", "1"), ("0", "0.5"), ("0.3", "0.85"), ("0.999", "1")])
HOLDOUTS = st.sampled_from(["0", "0.005", "0.1", "0.3", "0.9"])


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, object]:
    """Keyword arguments of a SourceOrder, its files among them, without a cache."""
    documents = draw(st.lists(LENGTHS, min_size=1, max_size=4))
    width = draw(st.sampled_from([np.int32, np.int64]))
    start, end = draw(SLICES)
    return {
        "files": [FakeFile(lengths, f"file {number}", width) for number, lengths in enumerate(documents)],
        "seed": draw(st.integers(0, 2**32)),
        "piece_tokens": draw(st.integers(1, 24)),
        "cache_dir": None,
        "document_slice": (Decimal(start), Decimal(end)),
        "holdout_fraction": Decimal(draw(HOLDOUTS)),
        "threads": draw(st.integers(1, 3)),
    }
