"""Laws M2 to M5 on runs whose config is edited on the way, resumed more than once, and looked back at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from made_runs import write_corpus
from mixed_runs import NAMES, TWO, begun, config_of, edited, samples_of, sources_of, write_corpora

from megatron.checkpoint.manifest import build_manifest, manifest_bytes
from megatron.commands.inspect_data import samples_between
from megatron.config.errors import ChangedPastError, ConfigError, DataError
from megatron.data.fim import FimSentinels
from megatron.data.ledger import Ledger
from megatron.data.samples import Sample
from megatron.planner.plan import plan_of
from megatron.planner.resolve import resolve_run

RAMP = {"name": "s", "samples": 60, "mixture": {"a": 1}, "ramp_to": {"c": 1}}
PHASES = {"name": "s", "samples": 60, "phases": [{"mixture": {"a": 1, "b": 1}}, {"mixture": {"c": 3, "a": 1}}]}
CONSTANT = {"name": "s", "samples": 60, "mixture": {"code": 1, "text": 2}}
ABSOLUTE = {"name": "s", "tokens": 960, "mixture_tokens": {"a": 401, "c": 564}}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.mark.parametrize("stage", [CONSTANT, RAMP, PHASES, ABSOLUTE], ids=["constant", "ramp", "phases", "absolute"])
@pytest.mark.parametrize("samples", [48, 120])
@pytest.mark.parametrize("dry", ["repeat", "renormalise"])
def test_M5_a_running_stage_is_made_longer_or_shorter_and_resumed_again(
    corpora: Path, stage: dict[str, Any], samples: int, dry: str
) -> None:
    """Phases and ramps stay where they were when the stage began, however often it is resumed after the edit."""
    sources = sources_of(corpora, b={"dry": dry, "max_epochs": "0.4"})
    length = {"tokens": samples * 16} if "tokens" in stage else {"samples": samples}
    order = samples_of(resolve_run(config_of(corpora, [dict(stage)], sources=sources)))
    found: list[Sample] = []
    ledger = begun(corpora, [stage], 20, sources=sources)
    for limit in (12, 8, None):
        run = resolve_run(config_of(corpora, [stage | length], sources=sources), ledger=ledger)
        found += samples_of(run, limit)
        ledger = Ledger.from_json(json.loads(json.dumps(run.ledger.to_json())))
    assert len(found) == samples - 20
    assert found[:40] == order[20 : min(60, samples)]


def test_M5_a_cap_is_edited_for_later_stages(corpora: Path) -> None:
    """A source that leaves the running stage under renormalise leaves it where it would have."""
    leaves = sources_of(corpora, b={"dry": "renormalise", "max_epochs": "0.4"})
    stages = [CONSTANT, CONSTANT | {"name": "later", "mixture": {"b": 1}, "samples": 8}]
    order = samples_of(resolve_run(config_of(corpora, [dict(CONSTANT)], sources=leaves)))
    ledger = begun(corpora, [CONSTANT], 20, sources=leaves)
    raised = sources_of(corpora, b={"dry": "renormalise", "max_epochs": "3"})
    run = resolve_run(config_of(corpora, [dict(stage) for stage in stages], sources=raised), ledger=ledger)
    assert any("max_epochs and dry of b stay 0.4" in note for note in run.schedule.stages[0].notes)
    found = samples_of(run)
    assert found[:40] == order[20:]
    assert {sample.source for sample in found[40:]} == {"b"}


def test_M5_content_is_past_from_the_first_sample_on_and_groups_from_the_stages_first(
    corpora: Path, tmp_path: Path
) -> None:
    stage = {"name": "s", "samples": 60, "phases": [{"mixture": {"a": 1}}, {"mixture": {"c": 1, "a": 1}}]}
    ledger = begun(corpora, [stage], 20)
    write_corpus(tmp_path / "new", 70, seed=5)
    sources = sources_of(corpora, c={"data": [str(tmp_path / "new")]})
    for limit in (28, None):
        run = resolve_run(config_of(corpora, [dict(stage)], sources=sources), ledger=ledger)
        samples_of(run, limit)
        ledger = Ledger.from_json(json.loads(json.dumps(run.ledger.to_json())))
    assert ledger.sources["c"].fingerprint == run.sources["c"].fingerprint
    with pytest.raises(ChangedPastError, match="source 'c': its fingerprint"):
        resolve_run(config_of(corpora, [dict(stage)]), ledger=ledger)
    early = begun(corpora, [stage], 20)
    regrouped = sources_of(corpora, c={"group": "code"})
    with pytest.raises(ChangedPastError, match="source 'c': its group was text and is now code"):
        resolve_run(config_of(corpora, [dict(stage)], sources=regrouped), ledger=early)


def test_M4_sources_without_part_need_no_tokens(corpora: Path) -> None:
    """One that is planned by its size, and one whose slice is empty, beside those that are trained on."""
    empty = {"data": [str(corpora / "a")], "slice": ["0", "0.001"], "allow_overlap": True}
    sources = sources_of(corpora) | {"planned": {"tokens": "5K"}, "empty": empty}
    assert len(samples_of(resolve_run(config_of(corpora, [dict(CONSTANT)], sources=sources)))) == 60
    stages = [CONSTANT, {"name": "later", "samples": 8, "mixture": {"planned": 1}}]
    with pytest.raises(DataError, match="'planned' has a size"):
        resolve_run(config_of(corpora, [dict(stage) for stage in stages], sources=sources)).stream()


def test_M2_cursors_are_taken_by_content_and_only_from_the_same_order(corpora: Path, tmp_path: Path) -> None:
    ledger = begun(corpora, TWO, 80)
    (tmp_path / "state.json").write_text(json.dumps({"data": ledger.to_json()}))
    (tmp_path / "manifest.json").write_bytes(manifest_bytes(build_manifest(tmp_path, 20, keep_forever=False)))
    stage = {"name": "three", "samples": 40, "mixture": {"a": 1, "renamed": 1}, "take": {"cursors": str(tmp_path)}}
    sources = sources_of(corpora)
    sources["renamed"] = sources.pop("c")
    whole = samples_of(
        resolve_run(config_of(corpora, [*TWO, {"name": "x", "samples": 40, "mixture": {"a": 1, "c": 1}}]))
    )
    run = resolve_run(config_of(corpora, [dict(stage)], sources=sources))
    assert run.schedule.stages[0].used_before["renamed"] == ledger.sources["c"].lifetime_tokens
    assert [s.pieces for s in samples_of(run)] == [s.pieces for s in whole[80:]]
    # the witness shows the begun stage without the checkpoint that its cursors came from
    (tmp_path / "state.json").unlink()
    resumed = resolve_run(config_of(corpora, [dict(stage)], sources=sources), ledger=run.ledger)
    assert [s.pieces for s in samples_between(resumed, 3, 30)] == [s.pieces for s in whole[83:110]]
    (tmp_path / "state.json").write_text(json.dumps({"data": ledger.to_json()}))
    with pytest.raises(ConfigError, match="read there with run.seed 7 and is read here with 8"):
        resolve_run(config_of(corpora, [dict(stage)], sources=sources, run={"name": "t", "output": "x", "seed": 8}))
    cut = sources | {"a": sources["a"] | {"piece_tokens": 50}}
    with pytest.raises(ConfigError, match="piece_tokens 128 and is read here with 50"):
        resolve_run(config_of(corpora, [dict(stage)], sources=cut))


def test_M3_the_witness_shows_what_an_edited_run_was_given(corpora: Path) -> None:
    """A stage made longer, and a group that gained a member: seen through the run's ledger, not by today's config."""
    ledger = begun(corpora, TWO, 56)
    sources = sources_of(corpora) | {"e": {"group": "text", "data": [str(corpora / "a")], "allow_overlap": True}}
    config = config_of(corpora, edited({}, {"samples": 80}), sources=sources)
    order = samples_of(resolve_run(config_of(corpora, [dict(stage) for stage in TWO])))[:56]
    run = resolve_run(config, ledger=ledger)
    order += samples_of(run)
    again = list(samples_between(resolve_run(config, ledger=run.ledger), 5, 120))
    assert [(s.source, s.pieces) for s in again] == [(s.source, s.pieces) for s in order[5:]]


def test_the_plan_is_what_training_gives(corpora: Path) -> None:
    sources = sources_of(corpora, b={"dry": "renormalise", "max_epochs": "0.4"})
    stages = [CONSTANT, RAMP | {"name": "r", "cursor": "restart"}, PHASES | {"name": "p", "seq_length": 24}]
    run = resolve_run(config_of(corpora, [dict(stage) for stage in stages], sources=sources))
    plan = plan_of(run)
    samples_of(run)
    for stage, record in zip(plan["stages"], run.ledger.stages, strict=True):
        assert {row["source"]: (row["samples"], row["tokens"]) for row in stage["sources"]} == {
            name: (use.samples, use.tokens) for name, use in record.use.items()
        }
    for row in plan["sources"]:
        assert row["tokens"] == run.ledger.sources[row["source"]].lifetime_tokens


def test_validation_documents_are_in_no_sample(corpora: Path) -> None:
    config = config_of(corpora, [CONSTANT | {"samples": 400}], validation={"fraction": "0.2", "every": 10})
    run = resolve_run(config)
    held = {n: set(run.sources[n].opened().held_out_documents().tolist()) for n in NAMES}
    assert all(held.values())
    assert all(piece.document not in held[s.source] for s in samples_of(run) for piece in s.pieces)


def test_M5_a_source_that_was_trained_on_must_stay(corpora: Path) -> None:
    ledger = begun(corpora, TWO, 56)
    sources = {name: table for name, table in sources_of(corpora).items() if name != "b"}
    config = config_of(corpora, [dict(stage) for stage in TWO], sources=sources)
    with pytest.raises(ChangedPastError, match="source 'b' was trained on and is gone"):
        resolve_run(config, ledger=ledger)


def test_M2_a_cap_counts_what_was_trained_on_before_cursors_went_back(corpora: Path, tmp_path: Path) -> None:
    early = begun(corpora, TWO, 20)
    (tmp_path / "state.json").write_text(json.dumps({"data": early.to_json()}))
    (tmp_path / "manifest.json").write_bytes(manifest_bytes(build_manifest(tmp_path, 5, keep_forever=False)))
    back = {"name": "back", "samples": 20, "mixture": {"c": 1}, "take": {"cursors": str(tmp_path)}}
    run = resolve_run(config_of(corpora, [*(dict(stage) for stage in TWO), back]))
    order = samples_of(run)
    first_after = next(sample for sample in order[20:] if sample.source == "c")
    assert order[80].pieces == first_after.pieces
    mine = 16 * sum(sample.source == "c" for sample in order)
    assert run.ledger.sources["c"].lifetime_tokens == mine
    assert run.schedule.stages[2].used_before["c"] == mine - 20 * 16


GROWING = {"name": "s", "tokens": "9.6K", "mixture": {"a": 1, "c": 1}, "global_batch_size": 64,
           "batch_ramp": {"start": 16, "increment": 16, "over": "98%"}}  # fmt: skip
LATER = {"name": "later", "samples": 64, "mixture": {"b": 1}}


def test_M3_a_stage_whose_last_shape_is_below_half_a_batch_keeps_its_length_on_resume(corpora: Path) -> None:
    run = resolve_run(config_of(corpora, [dict(GROWING), dict(LATER)]))
    planned = [stage.samples for stage in run.schedule.stages]
    for samples in (100, planned[0], planned[0] + 4):
        ledger = begun(corpora, [GROWING, LATER], samples)
        again = resolve_run(config_of(corpora, [dict(GROWING), dict(LATER)]), ledger=ledger)
        assert [stage.samples for stage in again.schedule.stages] == planned


@pytest.mark.parametrize(("asked", "given"), [(40, 40), (30, 32), (100, 100), (240, 240), (41, 40)])
def test_M5_a_running_stage_may_end_in_an_earlier_shape(corpora: Path, asked: int, given: int) -> None:
    shapes = [{"length": "80 samples", "seq_length": 8}, {"seq_length": 16}]
    stage = {"name": "s", "samples": 120, "mixture": {"a": 1, "c": 1}, "shapes": shapes, "global_batch_size": 4}
    order = samples_of(resolve_run(config_of(corpora, [dict(stage)])))
    ledger = begun(corpora, [stage], 20)
    run = resolve_run(config_of(corpora, [stage | {"samples": asked}]), ledger=ledger)
    assert run.schedule.samples == given
    assert any("asked" in note for note in run.schedule.stages[0].notes) == (asked != given)
    assert samples_of(run)[:100] == order[20 : min(120, given)]


@pytest.mark.parametrize("way", [{"like": "tp"}, {"reverse": "tp"}, {"aggregate_of": ["tp"]},
                                 {"blend": [{"weight": 1, "like": "tp"}]}])  # fmt: skip
def test_M5_a_begun_stage_keeps_what_a_template_was(corpora: Path, tmp_path: Path, way: dict[str, Any]) -> None:
    """A source that joins the template's group later, and a run made longer, are of later stages."""
    template = {"name": "tp", "share": "0.5", "mixture": {"code": 1, "text": 1}}
    stage = {"name": "s", **way, **({} if "aggregate_of" in way else {"samples": 120})}
    over = {"templates": [template], "train": {"global_batch_size": 4, "micro_batch_size": 1, "tokens": 3000}}
    order = samples_of(resolve_run(config_of(corpora, [dict(stage)], **over)))
    ledger = begun(corpora, [stage], 20, **over)
    write_corpus(tmp_path / "new", 30, seed=9)
    sources = sources_of(corpora) | {"e": {"group": "text", "data": [str(tmp_path / "new")]}}
    longer = over | {"train": over["train"] | {"tokens": 6000}}
    run = resolve_run(config_of(corpora, [dict(stage)], sources=sources, **longer), ledger=ledger)
    assert [sample.pieces for sample in samples_of(run)] == [sample.pieces for sample in order[20:]]


def test_M5_other_sentinels_are_another_past(corpora: Path) -> None:
    stage = {"name": "s", "samples": 40, "mixture": {"a": 1}, "fim": {"a": 1}}
    run = resolve_run(config_of(corpora, [dict(stage)]), fim_sentinels=FimSentinels(300, 301, 302))
    samples_of(run, 20)
    ledger = Ledger.from_json(json.loads(json.dumps(run.ledger.to_json())))
    for same in (None, FimSentinels(300, 301, 302)):
        resolve_run(config_of(corpora, [dict(stage)]), ledger=ledger, fim_sentinels=same)
    with pytest.raises(ChangedPastError, match=r"sentinels were \[300, 301, 302\] and are now \[302, 301, 300\]"):
        resolve_run(config_of(corpora, [dict(stage)]), ledger=ledger, fim_sentinels=FimSentinels(302, 301, 300))


def test_B1_epochs_of_a_mixture_and_a_length_that_both_change_are_refused(corpora: Path) -> None:
    phases = [{"mixture": {"c": 1}}, {"mixture": {"a": 1}}]
    stage = {"name": "s", "epochs": {"source": "c", "count": 1}, "phases": phases,
             "shapes": [{"length": "50%", "seq_length": 16}, {"seq_length": 64}]}  # fmt: skip
    with pytest.raises(ConfigError, match="epochs cannot be solved"):
        resolve_run(config_of(corpora, [stage]))
