"""Where ranks meet: what is said when they cannot."""

from __future__ import annotations

import socket

import pytest

from megatron.config.errors import LostProcessError
from megatron.parallel.health_board import open_board
from megatron.parallel.mesh import Launched


def test_a_port_that_another_program_has_is_named_as_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        with pytest.raises(LostProcessError, match=f"another program on this machine has.*{port}"):
            open_board(Launched(0, 2, 0, 2), 20)
