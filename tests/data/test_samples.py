"""Laws M1 to M6 on whole runs: real files, real sources, random schedules, against brute force."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_runs import run_config, write_corpus
from mixed_runs import NAMES, SIZES, TWO, begun, config_of, edited, samples_of, sources_of, write_corpora

from megatron.commands.inspect_data import samples_between
from megatron.config.errors import ChangedPastError, ConfigError
from megatron.data.assembly import assemble
from megatron.data.ledger import Ledger
from megatron.data.samples import Sample
from megatron.planner.resolve import resolve_run


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("corpora"))


def inputs_of(sample: Sample) -> Iterator[tuple[str, int, int, int]]:
    for piece in sample.pieces:
        for position in range(piece.start, piece.end):
            yield sample.source, piece.epoch, piece.document, position


weights = st.dictionaries(st.sampled_from(NAMES), st.sampled_from([0, 1, 2, 3, 7]), min_size=1).filter(
    lambda mixture: any(mixture.values())
)


@st.composite
def stage_tables(draw: st.DrawFn) -> dict[str, Any]:
    stage: dict[str, Any] = {"samples": draw(st.integers(1, 60))}
    kind = draw(st.sampled_from(["constant", "ramp", "phases"]))
    if kind == "phases" and stage["samples"] >= 20:
        stage["phases"] = [{"mixture": draw(weights)} for _ in range(draw(st.integers(1, 3)))]
    else:
        stage["mixture"] = draw(weights)
        if kind == "ramp":
            stage["ramp_to"] = draw(weights)
    stage["seq_length"] = draw(st.sampled_from([8, 16, 23]))
    stage["global_batch_size"] = draw(st.sampled_from([2, 4, 5]))
    return stage


@st.composite
def schedules(draw: st.DrawFn) -> list[dict[str, Any]]:
    return [
        stage | {"name": f"stage{i}"} for i, stage in enumerate(draw(st.lists(stage_tables(), min_size=1, max_size=4)))
    ]


common = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
usual, thorough = settings(common, max_examples=60), settings(common, max_examples=2000)


def check_laws(corpora: Path, stages: list[dict[str, Any]], cut: int, later: dict[str, Any]) -> None:
    config = config_of(corpora, [dict(stage) for stage in stages])
    run = resolve_run(config)
    order = samples_of(run)
    # M1: every prefix of every stage
    for stage in run.schedule.stages:
        counts: Counter[str] = Counter()
        for place, sample in enumerate(order[stage.start_sample : stage.end_sample], 1):
            counts[sample.source] += 1
            for name in NAMES:
                assert abs(counts[name] - stage.weights.target(name, place)) < 1
        assert {n: c for n, c in stage.counts.items() if c} == dict(counts)
    # every sample is exactly as long as it says
    for sample in order:
        stage, _ = run.schedule.locate(sample.number)
        assert sum(piece.end - piece.start for piece in sample.pieces) == stage.seq_length
    # M2: no token twice in an epoch, epochs one after the other, each whole before the next begins
    seen: dict[str, list[tuple[int, int, int]]] = {name: [] for name in NAMES}
    for sample in order:
        seen[sample.source] += [(epoch, document, position) for _, epoch, document, position in inputs_of(sample)]
    for name, inputs in seen.items():
        assert len(set(inputs)) == len(inputs)
        epochs = [epoch for epoch, _, _ in inputs]
        assert epochs == sorted(epochs)
        size = run.sources[name].epoch_tokens
        for epoch in range(epochs[-1] if epochs else 0):
            assert epochs.count(epoch) == size
    # M3: resumed from the ledger's JSON anywhere; a stage is added at the end; another horizon
    half = resolve_run(config)
    stream = half.stream()
    head: list[Sample] = []
    while len(head) < cut and not stream.finished:
        head += stream.next_batch()
    ledger = Ledger.from_json(json.loads(json.dumps(stream.ledger.to_json())))
    longer = config_of(corpora, [*(dict(stage) for stage in stages), later | {"name": "later"}])
    resumed = resolve_run(longer, ledger=ledger)
    assert head + samples_of(resumed)[: len(order) - len(head)] == order
    whole = resolve_run(longer)
    stream = whole.stream()
    while stream.consumed_samples < len(order):
        stream.next_batch()
    assert stream.ledger.order == run.ledger.order


@usual
@given(stages=schedules(), cut=st.integers(0, 150), later=stage_tables())
def test_M1_M2_M3_hold_over_random_schedules(
    corpora: Path, stages: list[dict[str, Any]], cut: int, later: dict[str, Any]
) -> None:
    check_laws(corpora, stages, cut, later)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@thorough
@given(stages=schedules(), cut=st.integers(0, 150), later=stage_tables())
def test_M1_M2_M3_hold_over_two_thousand_random_schedules(
    corpora: Path, stages: list[dict[str, Any]], cut: int, later: dict[str, Any]
) -> None:
    check_laws(corpora, stages, cut, later)


def test_M2_the_second_stage_replays_nothing(tmp_path: Path) -> None:
    """0.8/0.2 then 0.5/0.5, 1000 samples each, over sources larger than that: where a peer replays 70 %."""
    for seed, name in enumerate(("text", "code")):
        write_corpus(tmp_path / name, 500, seed, longest=200)
    sources = {name: {"data": [str(tmp_path / name)]} for name in ("text", "code")}
    stages = [
        {"name": "one", "samples": 1000, "mixture": {"text": 0.8, "code": 0.2}},
        {"name": "two", "samples": 1000, "mixture": {"text": 0.5, "code": 0.5}},
    ]
    order = samples_of(resolve_run(run_config(tmp_path, sources, stages)))
    assert Counter(sample.source for sample in order[:1000]) == {"text": 800, "code": 200}
    assert Counter(sample.source for sample in order[1000:]) == {"text": 500, "code": 500}
    first = {key for sample in order[:1000] for key in inputs_of(sample)}
    second = [key for sample in order[1000:] for key in inputs_of(sample)]
    assert len(second) == 16000 and first.isdisjoint(second)


def test_M2_restart_gives_the_same_samples_again(corpora: Path) -> None:
    stage = {"samples": 40, "mixture": {"a": 1}}
    stages = [stage | {"name": "one"}, stage | {"name": "two", "cursor": "restart"}, stage | {"name": "three"}]
    run = resolve_run(config_of(corpora, stages))
    order = samples_of(run)
    assert [s.pieces for s in order[:40]] == [s.pieces for s in order[40:80]] != [s.pieces for s in order[80:]]
    assert run.ledger.sources["a"].lifetime_tokens == 120 * 16


@usual
@given(stages=schedules(), other=weights)
def test_M3_unused_sources_and_table_order_change_nothing(
    corpora: Path, stages: list[dict[str, Any]], other: dict[str, int]
) -> None:
    order = samples_of(resolve_run(config_of(corpora, [dict(stage) for stage in stages])))
    extra = sources_of(corpora) | {"z": {"data": [str(corpora / "a")], "allow_overlap": True}}
    shuffled = dict(reversed(list(extra.items())))
    again = samples_of(resolve_run(config_of(corpora, [dict(stage) for stage in stages], sources=shuffled)))
    assert [(s.source, s.pieces) for s in order] == [(s.source, s.pieces) for s in again]


def test_M3_seeking_finds_the_samples_that_stepping_gives(corpora: Path) -> None:
    stages = [
        {"name": "one", "samples": 100, "mixture": {"code": 1, "text": 2}},
        {"name": "two", "samples": 60, "mixture": {"a": 1}, "ramp_to": {"c": 1}, "seq_length": 24},
    ]
    order = samples_of(resolve_run(config_of(corpora, stages)))
    for start, end in ((0, 3), (37, 61), (98, 103), (140, 160)):
        assert list(samples_between(resolve_run(config_of(corpora, stages)), start, end)) == order[start:end]


def test_M4_sources_join_late_leave_and_come_back_where_they_were(corpora: Path) -> None:
    stages = [
        {"name": "one", "samples": 20, "mixture": {"c": 1, "d": 0}},
        {"name": "two", "samples": 20, "mixture": {"d": 1}},
        {"name": "three", "samples": 20, "mixture": {"c": 1, "d": 1}},
    ]
    order = samples_of(resolve_run(config_of(corpora, stages)))
    assert [Counter(s.source for s in order[i : i + 20]) for i in (0, 20, 40)] == [
        {"c": 20},
        {"d": 20},
        {"c": 10, "d": 10},
    ]
    keys = [key for sample in order for key in inputs_of(sample)]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("stages", "over", "named"),
    [
        (edited({"mixture": {"code": 0.4, "text": 0.6}}), {}, "weights"),
        (edited({"name": "uno"}), {}, "'one'"),
        (edited({"samples": 44}), {}, "finished with 40"),
        (edited({}, {"mixture": {"code": 0.2, "text": 0.8}}), {}, "stage 'two'"),
        (edited({}, {"samples": 8}), {}, "are consumed"),
        (edited({}, {"seq_length": 8, "samples": 80}), {}, "sequence length"),
        (edited({"lr": {"peak": 0.002}}), {}, "learning rate"),
        (TWO[:1], {}, "gone"),
        (TWO, {"run": {"name": "t", "output": "x", "seed": 8}}, "run.seed"),
        (TWO, {"validation": {"fraction": "0.1"}}, "validation"),
    ],
)
def test_M5_a_changed_past_is_refused_by_name(
    corpora: Path, stages: list[dict[str, Any]], over: dict[str, Any], named: str
) -> None:
    ledger = begun(corpora, TWO, 56)
    with pytest.raises(ChangedPastError, match=named) as caught:
        resolve_run(config_of(corpora, [dict(stage) for stage in stages], **over), ledger=ledger)
    assert caught.value.exit_code == 5


def test_M5_a_finished_stage_made_longer_is_a_changed_past_before_it_runs_dry(corpora: Path) -> None:
    capped = sources_of(corpora, **{name: {"dry": "error"} for name in sources_of(corpora)})
    ledger = begun(corpora, TWO, 56, sources=capped)
    raised = {name: source | {"max_epochs": 10**6} for name, source in capped.items()}
    for sources in (capped, raised):
        with pytest.raises(ChangedPastError, match="finished with 40"):
            resolve_run(config_of(corpora, edited({"samples": 40_000}), sources=sources), ledger=ledger)


def test_M5_other_content_is_refused_and_another_place_is_not(corpora: Path, tmp_path: Path) -> None:
    ledger = begun(corpora, TWO, 56)
    write_corpus(tmp_path / "moved", SIZES["c"], seed=2)
    write_corpus(tmp_path / "other", SIZES["c"], seed=99)
    for prefix, fails in (("moved", False), ("other", True)):
        sources = sources_of(corpora, c={"data": [str(tmp_path / prefix)]})
        config = config_of(corpora, [dict(stage) for stage in TWO], sources=sources)
        if fails:
            with pytest.raises(ChangedPastError, match="source 'c': its fingerprint"):
                resolve_run(config, ledger=ledger)
        else:
            resolve_run(config, ledger=ledger)


def test_M5_the_future_is_editable(corpora: Path) -> None:
    order = samples_of(resolve_run(config_of(corpora, [dict(stage) for stage in TWO])))
    sources = sources_of(corpora) | {"e": {"group": "text", "data": [str(corpora / "a")], "allow_overlap": True}}
    stages = edited({}, {"samples": 80}) + [{"name": "three", "samples": 20, "mixture": {"text": 1}}]
    ledger = begun(corpora, TWO, 56)
    run = resolve_run(config_of(corpora, [dict(stage) for stage in stages], sources=sources), ledger=ledger)
    rest = samples_of(run)
    # the running stage goes on as it was, longer; the new member of a group has no part in it
    assert [(s.source, s.pieces) for s in rest[:24]] == [(s.source, s.pieces) for s in order[56:80]]
    assert "e" not in {s.source for s in rest[: 80 - 16]}
    assert "e" in {s.source for s in rest[80 - 16 :]}


def test_M5_an_allowed_change_of_the_learning_rate_is_recorded(corpora: Path) -> None:
    ledger = begun(corpora, TWO, 56)
    config = config_of(corpora, edited({"lr": {"peak": 0.002}}))
    run = resolve_run(config, ledger=ledger, allow_lr_change=True)
    assert [event["event"] for event in run.ledger.events] == ["lr-changed", "lr-changed"]
    resolve_run(config, ledger=Ledger.from_json(run.ledger.to_json()))


def test_M6_one_index_serves_every_arm(corpora: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "big", 600, seed=3)
    cache = tmp_path / "cache"
    sources = {"x": {"data": [str(tmp_path / "big")]}, "y": {"data": [str(corpora / "a")]}}

    def files() -> set[tuple[str, int]]:
        return {(path.name, path.stat().st_mtime_ns) for path in cache.iterdir()}

    def arm(**stage: Any) -> None:
        stages = [{"name": "s", "samples": 100, "mixture": {"x": 0.8, "y": 0.2}} | stage]
        samples_of(resolve_run(run_config(tmp_path, sources, stages, data={"cache": str(cache)})))

    arm()
    before = files()
    assert before
    arm(mixture={"x": 0.5, "y": 0.5})
    arm(samples=120, seq_length=8, global_batch_size=12)
    sources = {"renamed": sources["x"], "y": sources["y"]}
    arm(mixture={"renamed": 1})
    assert files() == before


def test_dry_sources_are_refused_before_training(corpora: Path) -> None:
    sources = sources_of(corpora, b={"dry": "error"})
    with pytest.raises(ConfigError, match=r"source 'b' runs dry.*max_epochs"):
        resolve_run(config_of(corpora, [{"name": "s", "samples": 400, "mixture": {"b": 1}}], sources=sources))


@usual
@given(mixture=weights, samples=st.integers(10, 200), caps=st.tuples(*[st.integers(1, 30)] * 4))
def test_M1_renormalised_sources_never_pass_their_cap(
    corpora: Path, mixture: dict[str, int], samples: int, caps: tuple[int, ...]
) -> None:
    rooms = dict(zip(NAMES, caps, strict=True))
    over = {n: {"dry": "renormalise", "max_epochs": str(rooms[n] / 10)} for n in ("a", "b", "c")}
    sources = sources_of(corpora, **over)
    table = {"name": "s", "samples": samples, "mixture": mixture | {"d": 1}}
    run = resolve_run(config_of(corpora, [table], sources=sources))
    order = samples_of(run)
    stage = run.schedule.stages[0]
    counts: Counter[str] = Counter()
    for place, sample in enumerate(order, 1):
        counts[sample.source] += 1
        assert all(abs(counts[n] - stage.weights.target(n, place)) < 1 for n in NAMES)
    for name in ("a", "b", "c"):
        assert run.ledger.sources[name].lifetime_tokens <= stage.facts[name].cap_tokens
    assert len(order) == stage.samples


def test_targets_are_the_next_token_of_the_same_document(corpora: Path) -> None:
    run = resolve_run(config_of(corpora, [{"name": "s", "samples": 60, "mixture": {"a": 1, "b": 1}}]))
    for sample in samples_of(run):
        source = run.sources[sample.source]
        arrays = assemble(sample, source, 16)
        file = source.opened().files.files[0]
        place = 0
        for number, piece in enumerate(sample.pieces):
            whole = file.tokens(piece.document, 0, int(file.document_lengths()[piece.document])).tolist()
            for position in range(piece.start, piece.end):
                assert arrays.tokens[place] == whole[position]
                follows = whole[position + 1] if position + 1 < len(whole) else -100
                assert arrays.targets[place] == follows
                assert arrays.document_ids[place] == number
                place += 1
        assert place == 16


def test_M2_cursors_taken_from_another_run_go_on_where_it_stopped(corpora: Path, tmp_path: Path) -> None:
    from megatron.checkpoint.manifest import build_manifest, manifest_bytes

    ledger = begun(corpora, TWO, 80)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"data": ledger.to_json()}))
    (folder / "manifest.json").write_bytes(manifest_bytes(build_manifest(folder, 20, keep_forever=False)))
    three = {"name": "three", "samples": 40, "mixture": {"code": 1, "text": 1}}
    whole = samples_of(resolve_run(config_of(corpora, [*(dict(stage) for stage in TWO), dict(three)])))
    config = config_of(corpora, [three | {"take": {"cursors": str(folder)}}])
    run = resolve_run(config)
    stream = run.stream()
    order = [sample for _ in range(5) for sample in stream.next_batch()]
    ledger = Ledger.from_json(json.loads(json.dumps(stream.ledger.to_json())))
    assert run.schedule.stages[0].used_before["c"] == sum(s.source == "c" for s in whole[:80]) * 16
    # resumed after the other run's checkpoint is gone
    (folder / "state.json").unlink()
    order += samples_of(resolve_run(config, ledger=ledger))
    assert [(s.source, s.pieces) for s in order] == [(s.source, s.pieces) for s in whole[80:]]
