"""What all layouts are compared with, made once in each test process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from layouts import table
from layouts.cases import ONE_PROCESS, Key, tolerance
from layouts.curves import Curve, Curves, Errors, compare, whole_curves, write_corpora


def pytest_configure(config: pytest.Config) -> None:
    """Where this file is read only after the start, as by processes of xdist, the table is not there yet."""
    if not config.pluginmanager.has_plugin("layouts.table"):
        config.pluginmanager.register(table, "layouts.table")


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both sources and their indexes."""
    return write_corpora(tmp_path_factory.mktemp("layouts"))


Reference = Callable[[Key, int], Curve]


@pytest.fixture(scope="session")
def one_process(corpora: Path) -> Reference:
    """(key, layers) -> the curve of one process."""
    return cache(lambda key, layers: whole_curves(ONE_PROCESS, corpora, [key], layers)[key])


Judge = Callable[[str, Curves, int], None]


@pytest.fixture
def judge(one_process: Reference, record_property: Callable[[str, object], None]) -> Judge:
    """Writes curves' errors in the table, then asserts that every one of them is within tolerance."""

    def against_one_process(layout: str, curves: Curves, layers: int) -> None:
        found = {key: compare(curve, _part(one_process(key, layers), curve)) for key, curve in curves.items()}
        record_property(table.PROPERTY, [_row(layout, *key, errors) for key, errors in found.items()])
        too_far = {key: errors for key, errors in found.items() if errors.worst > tolerance(key)}
        assert not too_far

    return against_one_process


def _part(reference: Curve, curve: Curve) -> Curve:
    steps = {fact.step for fact in curve}
    return tuple(fact for fact in reference if fact.step in steps)


def _row(layout: str, precision: str, variant: str, errors: Errors) -> tuple[str, ...]:
    figures = (errors.loss, errors.grad_norm, errors.by_source)
    return (layout, precision, variant, *(f"{figure:.1e}" for figure in figures))
