"""The board of ranks over torch.distributed's store: it needs no process group, so any thread may use it.

A blocking `wait` or `get` of a store holds its client's lock until the key is there: `check` in another thread on the
same client took 1.9 s while a wait of 2 s ran, 0.2 ms on a clone (torch 2.13, TCPStore). So a board has a connection
of its own, and asks with `check` instead of blocking.
"""

from __future__ import annotations

import time

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # not in the stub's list

from megatron.checkpoint.board import Board, LocalBoard
from megatron.config.errors import StorageError
from megatron.parallel.mesh import Mesh

_FIRST_PAUSE, _LONGEST_PAUSE = 0.005, 0.5


class RankBoard:
    """Words by key over a store. One object for each rank and process, made by all ranks in the same order."""

    def __init__(self, store: Store, rank: int, size: int, name: str = "board") -> None:
        """name: keeps the keys of several boards over one store apart."""
        self.rank = rank
        self.size = size
        self._store = PrefixStore(f"stagemix/{name}", store.clone())  # type: ignore[attr-defined]
        self._meetings = 0

    def meeting(self) -> str:
        """A new prefix of keys, the same on all ranks that ask in the same order."""
        self._meetings += 1
        return str(self._meetings)

    def post(self, key: str, words: bytes) -> None:
        """Leaves words under a key. Raises StorageError where the store is gone."""
        try:
            self._store.set(key, words)  # type: ignore[arg-type]  # bytes are taken, whatever the stub says
        except RuntimeError as error:
            raise _lost(error) from error

    def wait(self, key: str, seconds: float) -> bytes:
        """The words under a key, at most `seconds` later. Raises TimeoutError; StorageError where the store is gone."""
        end, pause = time.monotonic() + seconds, _FIRST_PAUSE
        while True:
            try:
                if self._store.check([key]):
                    return bytes(self._store.get(key))
            except RuntimeError as error:
                raise _lost(error) from error
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError(key)
            time.sleep(min(pause, left))
            pause = min(pause * 1.5, _LONGEST_PAUSE)

    def remove(self, key: str) -> None:
        """Takes words away that everyone has read."""
        try:
            self._store.delete_key(key)
        except RuntimeError as error:
            raise _lost(error) from error


def board_of(mesh: Mesh, name: str = "checkpoint") -> Board:
    """The board of a mesh's ranks. All ranks make it together."""
    return LocalBoard() if mesh.store is None else RankBoard(mesh.store, mesh.rank, mesh.world_size, name)


def _lost(error: RuntimeError) -> StorageError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return StorageError(
        f"the store that ranks meet at does not answer ({reason}): the process that kept it, mostly rank 0, has ended; "
        "what was saved before is untouched: see why it ended, then start the run again"
    )
