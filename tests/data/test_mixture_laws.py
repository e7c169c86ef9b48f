"""Laws M1 to M6 over random schedules: up to 6 stages of up to 40 sources, with zero weights, ramps, steps, references
to other stages, sources that run dry, sequence lengths and batches that change, interruptions and layouts.

The checks count for themselves: targets are integrated here from the weights' end points, tokens are counted one by
one, and the layouts are simulated by streams that load only some samples of each batch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from made_runs import write_corpus

from megatron.config.errors import ConfigError
from megatron.config.schema import SourceSection, StageSection
from megatron.data.fim import FimRates
from megatron.data.ledger import Ledger, add_to_order, fingerprint_word, order_sums
from megatron.data.past import Today, check_past, frozen_stages
from megatron.data.samples import Sample, SampleStream
from megatron.data.schedule import Schedule, TrainingStage, facts_of, resolve_schedule
from megatron.data.sources import OpenSource, open_sources

MOST_SOURCES, MOST_STAGES = 40, 6
SEED = 11


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, OpenSource]:
    """Forty sources in three groups, of 3 to 42 documents; opened once, as their indexes know no mixture (M6)."""
    folder = tmp_path_factory.mktemp("corpora")
    sections = {}
    for number in range(MOST_SOURCES):
        name = f"s{number:02}"
        write_corpus(folder / name, 3 + number, number)
        sections[name] = SourceSection(group=f"g{number % 3}", data=[str(folder / name)])
    return open_sources(sections, seed=SEED, seq_length=16, holdout_fraction=Decimal(0), cache_dir=folder / "cache")


@dataclass(frozen=True)
class Case:
    """One random run."""

    stages: list[dict[str, Any]]
    later: dict[str, Any]
    sources: dict[str, dict[str, Any]]
    cut: float
    ranks: int


def _mixtures(names: list[str]) -> st.SearchStrategy[dict[str, int]]:
    weights = st.dictionaries(st.sampled_from(names), st.sampled_from([0, 1, 1, 2, 3, 7, 1000]), min_size=1)
    return weights.filter(lambda mixture: any(mixture.values()))


@st.composite
def _stages(draw: st.DrawFn, names: list[str], earlier: list[str]) -> dict[str, Any]:
    stage: dict[str, Any] = {"samples": draw(st.integers(1, 80)), "seq_length": draw(st.sampled_from([4, 8, 16, 23]))}
    stage["global_batch_size"] = draw(st.integers(1, 6))
    kinds = ["constant", "constant", "ramp", "phases"] + (["reverse", "like", "blend"] if earlier else [])
    kind = draw(st.sampled_from(kinds))
    if kind in ("reverse", "like"):
        stage[kind] = draw(st.sampled_from(earlier))
    elif kind == "blend":
        other = {"weight": draw(st.integers(1, 5)), "like": draw(st.sampled_from(earlier))}
        stage["blend"] = [other, {"weight": draw(st.integers(1, 5)), "mixture": draw(_mixtures(names))}]
    elif kind == "phases" and stage["samples"] >= 30:
        stage["phases"] = [{"mixture": draw(_mixtures(names))} for _ in range(draw(st.integers(1, 3)))]
    else:
        stage["mixture"] = draw(_mixtures(names))
        if kind == "ramp":
            stage["ramp_to"] = draw(_mixtures(names))
    if draw(st.booleans()) and stage["samples"] >= 20:
        lengths = draw(st.lists(st.integers(1, 8), max_size=2))
        unit = draw(st.sampled_from(["0%", " samples"]))  # up to 80 % of the stage, or a few samples
        parts = [{"length": f"{n}{unit}", "seq_length": draw(st.sampled_from([4, 12, 23]))} for n in lengths]
        sizes = [{"global_batch_size": draw(st.integers(1, 4))} for _ in lengths]
        stage["shapes"] = [part | size for part, size in zip(parts, sizes, strict=True)] + [{}]
    if draw(st.integers(0, 5)) == 0:
        stage["cursor"] = "restart"
    return stage


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count = draw(st.one_of(st.integers(1, 4), st.integers(1, MOST_SOURCES)))
    names = [f"s{number:02}" for number in sorted(draw(st.permutations(range(MOST_SOURCES)))[:count])]
    stages: list[dict[str, Any]] = []
    for index in range(draw(st.integers(1, MOST_STAGES)) + 1):
        stages.append(draw(_stages(names, [stage["name"] for stage in stages])) | {"name": f"stage{index}"})
    dry = draw(st.lists(st.sampled_from(names), max_size=2, unique=True))
    caps = {n: {"dry": "renormalise", "max_epochs": str(draw(st.sampled_from([0.2, 0.5, 1.3, 3])))} for n in dry}
    sources = {name: caps.get(name, {"dry": "repeat"}) for name in names}
    return Case(stages[:-1], stages[-1], sources, draw(st.floats(0, 1)), draw(st.integers(1, 3)))


class World:
    """The schedule of a case, and streams over it."""

    def __init__(self, opened: Mapping[str, OpenSource], case: Case, stages: list[dict[str, Any]]) -> None:
        self.sources: dict[str, OpenSource] = {}
        for name, over in case.sources.items():
            section = SourceSection.model_validate(opened[name].section.model_dump() | over)
            self.sources[name] = replace(opened[name], section=section)
        self.sections = [StageSection.model_validate(stage) for stage in stages]
        self.facts = facts_of(
            {name: source.section for name, source in self.sources.items()},
            {name: source.epoch_tokens for name, source in self.sources.items()},
        )

    def resolve(self, ledger: Ledger | None = None) -> Schedule:
        begun = frozen_stages(ledger) if ledger else ()
        fim = {name: FimRates(Decimal("0.5"), Decimal("0.5")) for name in self.sources}
        schedule = resolve_schedule(self.sections, self.facts, seq_length=16, global_batch_size=4, begun=begun, fim=fim)
        if ledger is not None:
            identities = {name: source.identity() for name, source in self.sources.items()}
            today = Today(SEED, "", "", identities, [{}] * len(self.sections))
            check_past(ledger, schedule, today)
        return schedule

    def stream(self, schedule: Schedule, ledger: Ledger | None = None) -> SampleStream:
        return SampleStream(schedule, self.sources, ledger or Ledger(seed=SEED, tokenizer="", validation=""))


def taken(stream: SampleStream, samples: int) -> list[Sample]:
    order: list[Sample] = []
    while len(order) < samples and not stream.finished:
        order += stream.next_batch()
    return order


def check_M1(stage: TrainingStage, names: list[str]) -> None:
    """Every prefix of every source within one of its target, integrated here over the segments' end points."""
    places = np.arange(1, len(names) + 1)
    starts = [segment.start for segment in stage.weights.segments]
    for source in {*stage.weights.sources, *names}:
        counts = np.cumsum([name == source for name in names])
        target = np.zeros(len(names))
        for number, segment in enumerate(stage.weights.segments):
            end = starts[number + 1] if number + 1 < len(starts) else max(len(names), segment.start) + 1
            inside = np.clip(places - segment.start, 0, end - segment.start)
            first = segment.weights.get(source, 0)
            last = first if segment.to is None else segment.to.get(source, 0)
            slope = (last - first) / (end - segment.start)
            target += (first * inside + slope * inside * inside / 2) / stage.weights.denominator
        assert np.abs(counts - target).max() < 1 + 1e-9, source


def check_M2(world: World, schedule: Schedule, order: list[Sample]) -> None:
    """Between restarts: no token twice in an epoch, and each epoch whole before the next begins; caps are kept."""
    lifetime: Counter[str] = Counter()
    cursors: dict[str, list[tuple[int, int, int]]] = {}
    for stage in schedule.stages:
        if stage.cursor == "restart":
            cursors.clear()
        for sample in order[stage.start_sample : stage.end_sample]:
            length = stage.shape_at(sample.number - stage.start_sample).seq_length
            assert sum(piece.end - piece.start for piece in sample.pieces) == length
            lifetime[sample.source] += length
            seen = cursors.setdefault(sample.source, [])
            seen += [(p.epoch, p.document, place) for p in sample.pieces for place in range(p.start, p.end)]
        for name, inputs in cursors.items():
            assert len(set(inputs)) == len(inputs)
            epochs = [epoch for epoch, _, _ in inputs]
            assert epochs == sorted(epochs)
            sizes = Counter(epochs)
            assert all(sizes[epoch] == world.sources[name].epoch_tokens for epoch in range(epochs[-1]))
    for name, tokens in lifetime.items():
        assert world.facts[name].dry == "repeat" or tokens <= world.facts[name].cap_tokens


def check_order(world: World, case: Case, schedule: Schedule, order: list[Sample], ledger: Ledger) -> None:
    """M3: the hash is a sum over samples, and no layout changes what any rank's stream says."""
    for rank in range(case.ranks):
        stream = world.stream(schedule)
        while not stream.finished:
            size = stream.shape().global_batch_size
            first = stream.consumed_samples
            owned = set(range(rank, size, case.ranks))
            for place, sample in enumerate(stream.next_batch(owned)):
                assert sample.source == order[first + place].source
                if place in owned:
                    assert sample.pieces == order[first + place].pieces and sample.fim == order[first + place].fim
        assert stream.ledger.order == ledger.order
        states = {name: source.cursor for name, source in ledger.sources.items()}
        assert {name: source.cursor for name, source in stream.ledger.sources.items()} == states


def check_laws(opened: Mapping[str, OpenSource], case: Case) -> None:
    world = World(opened, case, case.stages)
    try:
        schedule = world.resolve()
    except ConfigError as error:
        if "run dry" in str(error) or "runs dry" in str(error) or "phase is shorter" in str(error):
            reject()
        if "is left for the last" in str(error):
            reject()
        raise
    stream = world.stream(schedule)
    order = taken(stream, schedule.samples)
    for stage in schedule.stages:
        names = [sample.source for sample in order[stage.start_sample : stage.end_sample]]
        check_M1(stage, names)
        assert {n: c for n, c in stage.counts.items() if c} == dict(Counter(names))  # M4 among it: zero is a weight
        tokens = Counter({n: use.tokens for n, use in stream.ledger.stages[stage.index].use.items()})
        assert tokens == Counter(stage.source_tokens)
    assert stream.ledger.consumed_tokens == schedule.tokens and stream.ledger.consumed_steps == schedule.steps
    check_M2(world, schedule, order)
    check_order(world, case, schedule, order, stream.ledger)
    # M5: stopped anywhere and resumed from JSON, with a stage more at the end: the same samples again
    head_stream = world.stream(schedule)
    head = taken(head_stream, int(case.cut * schedule.samples))
    ledger = Ledger.from_json(json.loads(json.dumps(head_stream.ledger.to_json())))
    longer = World(opened, case, [*case.stages, case.later])
    try:
        resumed = longer.resolve(ledger)
    except ConfigError:
        resumed, longer = world.resolve(ledger), world
    tail_stream = longer.stream(resumed, ledger)
    assert head + taken(tail_stream, schedule.samples - len(head)) == order
    assert tail_stream.ledger.order == stream.ledger.order


common = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(4))
def test_M1_to_M6_hold_over_two_thousand_random_schedules(part: int, opened: dict[str, OpenSource]) -> None:
    """In four parts of 500, so that processes share them out."""

    @settings(common, max_examples=500)
    @given(cases())
    def hold(case: Case) -> None:
        check_laws(opened, case)

    hold()


def test_the_hash_is_the_sum_of_what_each_sample_adds() -> None:
    words = np.array([fingerprint_word(name) for name in ("a", "b", "a")], dtype=np.uint64)
    order = [0, 0]
    for number in range(3):
        add_to_order(order, order_sums([number], words[number : number + 1], [number * 16], 16))
    assert tuple(order) == order_sums(range(3), words, [0, 16, 32], 16)
