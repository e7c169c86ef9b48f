"""Which kernels a call launches."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest


def counted(monkeypatch: pytest.MonkeyPatch, module: ModuleType, *kernels: str) -> list[str]:
    """The names of a module's kernels, from now on added to this list as they are launched."""
    launched: list[str] = []

    class Counting:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: Any) -> Any:
            launched.append(self.name)
            return self.kernel[grid]

    for name in kernels:
        monkeypatch.setattr(module, name, Counting(name, getattr(module, name)))
    return launched
