"""What one rank of many tells its launcher of another's failure, without any process."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.config.errors import EXIT_DATA, EXIT_LOST_PROCESS
from megatron.parallel.health import Failure, Health
from megatron.parallel.health_board import Board
from megatron.parallel.mesh import host_name

STORE: Any = None  # nobody asks it


@pytest.mark.parametrize(
    ("rank", "speaks", "host", "told"),
    [
        (3, True, host_name(), ("planted.bin: gone", 1000)),
        (0, True, host_name(), ("rank 3 failed first", 1002)),
        (8, True, "elsewhere", ("rank 3 failed first, on elsewhere: planted.bin: gone", 1001)),
        (9, False, "elsewhere", ("rank 3 failed first", 1002)),
    ],
    ids=["its own", "the same node", "one of another node", "the rest of it"],
)
def test_the_first_is_the_earliest_and_each_node_hears_of_it_once(
    rank: int, speaks: bool, host: str, told: tuple[str, int]
) -> None:
    heard: list[tuple[str, int]] = []
    health = Health(Board(STORE, rank, 16), 0, speaks=speaks)
    health.tell = lambda message, when, trace: heard.append((message, when))
    health._tell_the_launcher(Failure(3, EXIT_DATA, "planted.bin: gone", host=host, when=1000), "")
    assert heard == [told]


def test_who_tells_of_a_lost_rank_did_not_fail() -> None:
    assert Failure(2, EXIT_LOST_PROCESS, "lost").who == "rank 2 noticed it first"
    assert Failure(2, EXIT_DATA, "gone").who == "rank 2 failed first"
