"""What commands that move weights show: a bar with rate and time left on a terminal, nothing where no one watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def shown(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A function of (bytes done, bytes of all) that shows them on standard error; None where that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    with tqdm(total=0, unit="B", unit_scale=True, desc=what, file=sys.stderr, leave=False) as bar:

        def show(done: int, whole: int) -> None:
            if bar.total != whole:
                bar.reset(whole)
            bar.update(done - bar.n)

        yield show
