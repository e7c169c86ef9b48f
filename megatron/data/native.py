"""The one door to the C++ extension. Without it the Python twins run, with equal results and at lower speed."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType


@cache
def native() -> ModuleType | None:
    """The extension module `megatron.data._native`, or None where it was not built."""
    try:
        return import_module("megatron.data._native")
    except ModuleNotFoundError as error:
        if error.name != "megatron.data._native":
            raise
        return None


def backend_name() -> str:
    """What runs, in words, for the line that is printed once at start (law T3)."""
    if native() is not None:
        return "native (C++)"
    return "NumPy and Python twins (the C++ extension was not built: same results, slower)"
