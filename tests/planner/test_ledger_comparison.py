"""Where two runs part, against the samples themselves, taken one by one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from made_runs import run_config, write_corpus

from megatron.data.ledger import Ledger
from megatron.data.samples import Sample
from megatron.planner.ledger_comparison import differences, parting, same_samples
from megatron.planner.resolve import resolve_run

Taken = tuple[Ledger, list[tuple[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    for seed, name in enumerate(("a", "b", "c")):
        write_corpus(folder / name, 80, seed)
    return folder


def stages() -> list[dict[str, Any]]:
    return [
        {"name": "one", "samples": 80, "mixture": {"a": 0.5, "b": 0.5}},
        {"name": "two", "samples": 60, "mixture": {"a": 0.1, "b": 0.4, "c": 0.5}},
    ]


def taken(folder: Path, sections: list[dict[str, Any]], samples: int, names: str = "abc", seed: int = 7) -> Taken:
    """The ledger after so many samples, and the samples: content and pieces."""
    sources = {
        name: {"data": [str(folder / corpus)], "max_epochs": 9} for name, corpus in zip(names, "abc", strict=True)
    }
    run_section = {"name": "t", "output": str(folder / "run"), "seed": seed}
    run = resolve_run(run_config(folder, sources, sections, run=run_section))
    stream = run.stream()
    order: list[Sample] = []
    while len(order) < samples:
        order += stream.next_batch()
    content = {name: source.fingerprint for name, source in run.sources.items()}
    return stream.ledger, [(content[sample.source], sample.pieces) for sample in order]


def first_difference(one: list[Any], other: list[Any]) -> int | None:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)


def changed(**change: Any) -> list[dict[str, Any]]:
    sections = stages()
    for path, value in change.items():
        number, key = path.split("__")
        sections[int(number.removeprefix("s"))][key] = value
    return sections


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (changed(s0__mixture={"a": 0.6, "b": 0.4}), "stages.one.weights"),
        (changed(s0__samples=60), "stages.one.planned_samples"),
        (changed(s0__samples=100), "stages.one.planned_samples"),
        (changed(s1__mixture={"a": 0.1, "b": 0.5, "c": 0.4}), "stages.two.weights"),
        (changed(s1__cursor="restart"), "stages.two.cursor"),
        (changed(s1__seq_length=32), "stages.two.shapes"),
        (changed(s1__shapes=[{"length": "20 samples"}, {"seq_length": 32}]), "stages.two.shapes"),
        (changed(s0__ramp_to={"a": 0.4, "b": 0.6}), "stages.one.weights"),
        (changed(s1__phases=[{"mixture": {"c": 1}}, {"mixture": {"a": 1}}], s1__mixture=None), "stages.two.weights"),
    ],
)
def test_the_parting_is_the_first_sample_that_differs(folder: Path, other: list[dict[str, Any]], what: str) -> None:
    other = [{key: value for key, value in stage.items() if value is not None} for stage in other]
    one, order = taken(folder, stages(), 120)
    two, others = taken(folder, other, 120)
    expected = first_difference(order, others)
    assert expected is not None
    found = parting(one, two)
    assert found.sample == expected and found.known
    assert parting(two, one).sample == expected
    assert not same_samples(one, two)
    assert what in {difference.what for difference in differences(one, two)}


def test_another_fill_in_the_middle_rate_parts_at_the_first_sample_of_its_source(folder: Path) -> None:
    one, order = taken(folder, stages(), 120)
    two, _ = taken(folder, changed(s1__fim={"c": 0.5}), 120)
    content = one.sources["c"].fingerprint
    assert one.order == two.order and not same_samples(one, two)
    assert parting(one, two).sample == next(n for n, (its, _) in enumerate(order) if its == content)
    assert [difference.what for difference in differences(one, two)] == ["stages.two.fim"]


def test_another_seed_parts_at_once_though_the_hash_of_the_order_is_the_same(folder: Path) -> None:
    one, order = taken(folder, stages(), 80)
    two, others = taken(folder, stages(), 80, seed=8)
    assert one.order == two.order and order != others
    assert not same_samples(one, two)
    assert parting(one, two).sample == 0
    assert [difference.what for difference in differences(one, two)][0] == "seed"


def test_renamed_sources_that_keep_the_order_do_not_part(folder: Path) -> None:
    one, order = taken(folder, stages(), 80)
    sections = [
        {**stage, "mixture": {f"x{name}": weight for name, weight in stage["mixture"].items()}} for stage in stages()
    ]
    two, others = taken(folder, sections, 80, names=["xa", "xb", "xc"])  # type: ignore[arg-type]
    assert order == others and same_samples(one, two)
    assert parting(one, two).sample is None and parting(one, two).known
    assert {difference.what for difference in differences(one, two)} >= {"sources.a", "sources.xa"}


def test_a_run_that_went_on_does_not_part_from_itself(folder: Path) -> None:
    early, _ = taken(folder, stages(), 40)
    late, _ = taken(folder, stages(), 120)
    found = parting(early, late)
    assert found.sample is None and found.known and "sample 40, where B goes on to 120" in found.reason
    assert not same_samples(early, late)
    assert "has begun only in B" in " ".join(difference.words for difference in differences(early, late))


def test_what_cannot_be_told_is_said(folder: Path) -> None:
    one, _ = taken(folder, stages(), 40)
    two = copy.deepcopy(one)
    two.order[0] ^= 1
    found = parting(one, two)
    assert found.sample is None and not found.known and not same_samples(one, two)


def test_rates_caps_content_and_events_are_said_in_words(folder: Path) -> None:
    one, _ = taken(folder, stages(), 40)
    two = copy.deepcopy(one)
    two.stages[0].lr["peak"] = 0.5
    two.stages[0].caps["a"] = ["2", "repeat"]
    two.sources["b"].fingerprint = "f" * 64
    two.events.append({"event": "lr-changed", "stage": "one", "sample": 12})
    words = [difference.words for difference in differences(one, two)]
    assert "stage 'one': its learning rate: peak 0.001 and 0.5" in words
    assert "stage 'one': its caps (max_epochs, dry): a 9/error and 2/repeat" in words
    assert any("source 'b': its fingerprint is" in word and "other content" in word for word in words)
    assert any("only in B" in word and "lr-changed" in word for word in words)
