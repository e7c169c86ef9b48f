"""The one door to the C++ extension. Without it the Python twins run, with equal results and at lower speed."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

from megatron.config.errors import UnavailableError

_NAME = "megatron.data._native"


@cache
def native() -> ModuleType | None:
    """The extension module `megatron.data._native`, or None where it was not built."""
    try:
        return import_module(_NAME)
    except ModuleNotFoundError as error:
        if error.name != _NAME:
            raise
        return None
    except ImportError as error:
        # Built, but not for this interpreter or against a library that is gone: falling back would be silent (T3).
        raise UnavailableError(
            f"the C++ extension {_NAME} was built and does not load: {error}. Build it again with "
            "`pip install --no-deps -e .`, or delete the file to run on the Python twins"
        ) from None


def backend_name() -> str:
    """What runs, in words, for the line that is printed once at start (law T3)."""
    if native() is not None:
        return "native (C++)"
    return "NumPy and Python twins (the C++ extension was not built: same results, slower)"
