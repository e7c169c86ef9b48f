"""Words between ranks: bounded waits, silent ranks by name, and no thread in another's way."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from ranks import run_ranks
from torch.distributed import TCPStore

from megatron.checkpoint.board import LocalBoard, Meeting
from megatron.config.errors import StorageError
from megatron.config.layout import Layout
from megatron.parallel.mesh import launched, one_process_mesh, open_mesh
from megatron.parallel.rank_board import RankBoard, board_of


def talk(ranks: int) -> tuple[str, str, float]:
    mesh = open_mesh(Layout(replicate=ranks), launched(), 60)
    board = board_of(mesh)
    meeting = Meeting(board, 60, "talk")
    nothing = meeting.agree("health", "")
    problem = Meeting(board, 60, "talk").agree("health", f"of {mesh.rank}" if mesh.rank else "")
    # A thread that waits for what never comes must not hold up the mesh's own use of the store.
    waiting = threading.Thread(target=lambda: pytest.raises(TimeoutError, board.wait, "never", 3.0))
    waiting.start()
    time.sleep(0.3)
    began = time.monotonic()
    for _ in range(20):
        mesh.store.check(["something"])  # type: ignore[union-attr]
        mesh.sum_on_host([0])
    seconds = time.monotonic() - began
    assert waiting.is_alive()
    waiting.join()
    return nothing, problem, seconds


def test_ranks_agree_while_threads_wait() -> None:
    for nothing, problem, seconds in run_ranks(3, talk, 3):
        assert nothing == "" and problem == "of 1" and seconds < 2.5


def fall_silent(ranks: int) -> str:
    mesh = open_mesh(Layout(replicate=ranks), launched(), 60)
    meeting = Meeting(board_of(mesh), 1.0, "/there/step-5")
    if mesh.rank in (1, 3):
        time.sleep(4)
        return ""
    try:
        return meeting.agree("health", "")
    except StorageError as error:
        return str(error)


def test_all_silent_ranks_are_named_to_rank_0_and_rank_0_to_the_others() -> None:
    words = run_ranks(4, fall_silent, 4)
    assert words[0].startswith("/there/step-5: ranks 1, 3 did not answer within 1 seconds")
    assert words[2].startswith("/there/step-5: rank 0 did not answer within 2 seconds")


def test_a_store_that_is_gone_is_said_so() -> None:
    """The process that keeps the store is killed, as rank 0 may be."""
    ready, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        store = TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
        os.write(theirs, str(store.port).encode())
        time.sleep(60)
        os._exit(0)
    client = TCPStore("127.0.0.1", int(os.read(ready, 20)), None, is_master=False, wait_for_workers=False)
    board = RankBoard(client, 1, 2)
    board.post("a", b"\x00\xff")
    assert board.wait("a", 5) == b"\x00\xff"
    board.remove("a")
    with pytest.raises(TimeoutError):
        board.wait("a", 0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for action in (lambda: board.wait("b", 30), lambda: board.post("b", b""), lambda: board.remove("b")):
        began = time.monotonic()
        with pytest.raises(StorageError, match="the store that ranks meet at does not answer"):
            action()
        assert time.monotonic() - began < 20


def test_one_process_needs_no_store() -> None:
    board = board_of(one_process_mesh())
    assert isinstance(board, LocalBoard) and Meeting(board, 1, "alone").agree("x", "problem") == "problem"
    board.post("a", b"1")
    assert board.wait("a", 0) == b"1"
    board.remove("a")
    with pytest.raises(TimeoutError):
        board.wait("a", 0.05)
