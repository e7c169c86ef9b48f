"""Instruction stages: which targets count, weights by loss tokens, what is refused, and what a resume compares."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import run_config
from masked_runs import Document, chats, write_masked
from tiny_run import write_corpus

from megatron.config.errors import ChangedPastError, ConfigError, DataError
from megatron.config.schema import RunConfig
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.ledger import Ledger
from megatron.data.loader import Batch, BatchLoader, validation_batches
from megatron.planner.ledger_comparison import differences, same_samples
from megatron.planner.plan import plan_of
from megatron.planner.resolve import ResolvedRun, resolve_run
from megatron.study.identity import hash_of, train_document
from megatron.study.steps import TrainStep

MASKED: dict[str, list[Document]] = {"chat": chats(3, answered=0.2), "codechat": chats(4, 40, answered=0.9, longest=90)}
GROUPS = {"chat": "chats", "codechat": "chats", "prose": "text"}
SFT: dict[str, Any] = {"name": "sft", "samples": 40, "objective": "instruction", "mixture": {"chats": 1}}
WHOLE: dict[str, Any] = {"whole_loss": ["text"], "mixture": {"chats": 0.6, "text": 0.4}}
Write = Callable[..., Path]


@pytest.fixture
def corpora(tmp_path: Path) -> Path:
    """Two sources with masks, one without."""
    write_corpus(tmp_path / "prose", 2)
    for name, documents in MASKED.items():
        write_masked(tmp_path / name, documents)
    return tmp_path


def config_of(folder: Path, *stages: dict[str, Any], sources: dict[str, dict[str, Any]] | None = None) -> RunConfig:
    tables = {
        name: {"group": group, "data": [str(folder / name)], "max_epochs": 99} | (sources or {}).get(name, {})
        for name, group in GROUPS.items()
    }
    return run_config(
        folder, tables, [dict(stage) for stage in stages], validation={"fraction": "0.2"}, data={"cache": str(folder)}
    )


def resolved(folder: Path, *stages: dict[str, Any], ledger: Ledger | None = None, **over: Any) -> ResolvedRun:
    return resolve_run(config_of(folder, *stages, **over), ledger=ledger)


def batches(run: ResolvedRun) -> list[Batch]:
    with BatchLoader(run.stream(), run.sources, 4, 0) as loader:
        return list(loader)


def notes(run: ResolvedRun, stage: int = -1) -> str:
    return "\n".join(run.schedule.stages[stage].notes)


def shares(run: ResolvedRun, phase: int = 0) -> dict[str, Fraction]:
    weights = run.schedule.stages[-1].weights
    units = weights.segments[phase].weights
    return {name: Fraction(unit, weights.denominator) for name, unit in units.items()}


def loss_density(run: ResolvedRun, name: str) -> Fraction:
    """Targets that count, by places, over the documents that are trained on: from the documents themselves."""
    held = set(run.sources[name].opened().held_out_documents().tolist())
    kept = [document for number, document in enumerate(MASKED[name]) if number not in held]
    return Fraction(sum(sum(bits[1:]) for _, bits in kept), sum(len(ids) for ids, _ in kept))


# -- what counts -------------------------------------------------------------------------------------------------------


def test_inputs_and_order_are_those_of_pre_training(corpora: Path) -> None:
    plain = {key: value for key, value in (SFT | WHOLE).items() if key not in ("objective", "whole_loss")}
    one, other = resolved(corpora, SFT | WHOLE), resolved(corpora, plain)
    learned, all_learned = batches(one), batches(other)
    assert [batch.digest for batch in learned] == [batch.digest for batch in all_learned]
    assert one.ledger.order_hash == other.ledger.order_hash
    names = sorted(one.sources)
    for mine, theirs in zip(learned, all_learned, strict=True):
        assert mine.valid_targets < theirs.valid_targets
        for ours, whole in zip(mine.microbatches, theirs.microbatches, strict=True):
            for row, source in enumerate(ours.source_ids.tolist()):
                kept = ours.targets[row] >= 0
                assert (ours.targets[row][kept] == whole.targets[row][kept]).all()
                assert names[source] != "prose" or (ours.targets[row] == whole.targets[row]).all()


def test_a_source_is_masked_in_one_stage_and_whole_in_another(corpora: Path) -> None:
    stages = [
        {"name": "pre", "samples": 40, "mixture": {"chats": 1}},
        SFT,
        SFT | {"name": "all", "whole_loss": ["chats"]},
    ]
    run = resolved(corpora, *stages, sources=dict.fromkeys(MASKED, {"max_epochs": 99}))
    by_stage: dict[str, int] = {}
    for batch in batches(run):
        by_stage[batch.training_stage] = by_stage.get(batch.training_stage, 0) + batch.valid_targets
    assert by_stage["sft"] < by_stage["pre"] / 2 and by_stage["all"] > 0.9 * by_stage["pre"]
    assert run.ledger.stages[2].objective["masks"] == {}


def test_held_out_documents_of_masked_sources_count_on_masked_targets(corpora: Path) -> None:
    run = resolved(corpora, SFT)
    for masked in ((), ("chat",)):
        counts = dict.fromkeys(GROUPS, 0)
        for micro in validation_batches(run.sources, 16, 4, 10_000, masked):
            for row, source in enumerate(micro.source_ids.tolist()):
                counts[sorted(GROUPS)[source]] += int((micro.targets[row] >= 0).sum())
        held = run.sources["chat"].opened().held_out_documents().tolist()
        marked = sum(sum(MASKED["chat"][n][1][1:]) for n in held)
        everything = sum(len(MASKED["chat"][n][0]) - 1 for n in held)
        # a last window that is not full is left out
        assert (marked if masked else everything) - 16 <= counts["chat"] <= (marked if masked else everything)
        assert counts["codechat"] > 0


# -- weights by loss tokens --------------------------------------------------------------------------------------------


def test_weights_by_loss_tokens_are_what_the_documents_make_of_them(corpora: Path) -> None:
    """Shares of samples from the documents by hand; over many samples the shares of valid targets come out as asked."""
    asked = {"chat": Fraction(5, 8), "codechat": Fraction(3, 8)}
    stage = SFT | {"samples": 3000, "weigh_by": "loss-tokens", "mixture": {"chat": 5, "codechat": 3}}
    run = resolved(corpora, stage)
    needed = {name: share / loss_density(run, name) for name, share in asked.items()}
    total = sum(needed.values())
    for name, share in shares(run).items():
        assert abs(share - needed[name] / total) <= Fraction(1, 10**6)
    chat, codechat = (f"{float(needed[name] / total):.2f}" for name in ("chat", "codechat"))
    assert f"chat:codechat = 5:3 of loss tokens = {chat}:{codechat} of samples" in notes(run)
    counts = np.zeros(3, np.int64)
    for batch in batches(run):
        for micro in batch.microbatches:
            for row, source in enumerate(micro.source_ids.tolist()):
                counts[source] += int((micro.targets[row] >= 0).sum())
    assert counts[0] / counts.sum() == pytest.approx(5 / 8, abs=0.01) and counts[2] == 0
    record = run.ledger.stages[0]
    assert record.objective["weigh_by"] == "loss-tokens" and record.weights == run.schedule.stages[0].weights.to_json()
    assert record.objective["loss_tokens"]["chat"] / record.sizes["chat"] == float(loss_density(run, "chat"))


def test_groups_share_by_epochs_and_whole_sources_by_all_their_targets(corpora: Path) -> None:
    run = resolved(corpora, SFT | WHOLE | {"weigh_by": "loss-tokens", "mixture": {"chats": 3, "text": 5}})
    found = shares(run)
    sizes = {name: source.epoch_tokens for name, source in run.sources.items()}
    assert float(found["chat"] / found["codechat"]) == pytest.approx(sizes["chat"] / sizes["codechat"], rel=1e-5)
    prose = run.sources["prose"].opened()
    lengths = np.delete(prose.files.targets_by_document(False), prose.held_out_documents())
    density = {name: loss_density(run, name) for name in MASKED} | {
        "prose": Fraction(int(lengths.sum()), sizes["prose"])
    }
    tokens = {name: share * density[name] for name, share in found.items()}
    assert float(tokens["prose"] / sum(tokens.values())) == pytest.approx(5 / 8, abs=1e-5)
    assert "chats:text = 3:5 of loss tokens = 0." in notes(run)


def test_phases_and_ramps_are_converted_where_they_begin_and_end(corpora: Path) -> None:
    phases = [{"mixture": {"chat": 1, "codechat": 1}}, {"mixture": {"chat": 1}, "ramp_to": {"codechat": 1}}]
    stage = {key: value for key, value in SFT.items() if key != "mixture"} | {
        "weigh_by": "loss-tokens",
        "phases": phases,
    }
    run = resolved(corpora, stage)
    one = resolved(corpora, SFT | {"weigh_by": "loss-tokens", "mixture": {"chat": 1, "codechat": 1}})
    assert shares(run) == shares(one) and shares(run)["chat"] > Fraction(1, 2)
    assert shares(run, 1)["chat"] == 1
    assert "phase 1: chat:codechat = 1:1 of loss tokens" in notes(run)
    assert "phase 2: chat = 1 of loss tokens = 1 of samples; at its end codechat = 1 of loss tokens" in notes(run)


def test_a_stage_that_refers_to_one_by_loss_tokens_has_its_samples(corpora: Path) -> None:
    by_loss = SFT | {"weigh_by": "loss-tokens", "mixture": {"chat": 1, "codechat": 1}}
    run = resolved(corpora, by_loss, {"name": "again", "samples": 40, "like": "sft"})
    assert run.schedule.stages[0].weights == run.schedule.stages[1].weights
    assert "of loss tokens" not in notes(run)


def test_whole_loss_of_what_has_no_weight_is_told(corpora: Path) -> None:
    said = notes(resolved(corpora, SFT | {"whole_loss": ["text"]}))
    assert "whole_loss names 'text', which has no weight in the stage: it changes nothing" in said
    assert "changes nothing" not in notes(resolved(corpora, SFT | WHOLE))


def test_B1_a_truncation_that_leaves_no_target_is_the_cause_that_is_told(corpora: Path) -> None:
    late: list[Document] = [([1] * 40, [0] * 30 + [1] * 10)] * 20
    write_masked(corpora / "chat", late)
    stage = SFT | {"mixture": {"chat": 1}, "packing": "padded", "too_long": "truncate"}
    with pytest.raises(
        ConfigError, match=r"more than 16 tokens.*cut off \(too_long = 'truncate'\).*seq_length above 16"
    ):
        resolved(corpora, stage)
    write_masked(corpora / "chat", [(ids, [0] * 40) for ids, _ in late])
    with pytest.raises(ConfigError, match="none of the .* trained on: look at it"):
        resolved(corpora, stage)


def test_the_plan_says_what_is_learned(corpora: Path) -> None:
    plan = plan_of(resolved(corpora, SFT | WHOLE))
    words = "\n".join(plan["stages"][0]["notes"])
    assert "the loss is on: chat " in words and "prose all of it" in words
    assert plan["stages"][0]["objective"]["masks"].keys() == {"chat", "codechat"}


def test_sources_that_are_not_there_yet_are_planned(tmp_path: Path) -> None:
    sources = {"chat": {"tokens": 9000}, "web": {"tokens": 90000}}
    stage = SFT | {"mixture": {"chat": 3, "web": 1}, "whole_loss": ["web"], "weigh_by": "loss-tokens"}
    run = resolve_run(run_config(tmp_path, sources, [stage]))
    assert shares(run) == {"chat": Fraction(3, 4), "web": Fraction(1, 4)}
    assert "chat, not there yet, all of it as far as is known" in notes(run)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"mixture": {"chats": 1, "text": 1}}, r"'prose' has no loss mask.*--format chat.*whole_loss = \[\"prose\"\]"),
        ({"whole_loss": ["texts"]}, "whole_loss names 'texts', which is neither a source nor a group: did you"),
        ({"fim": {"chat": 0.5}}, "source 'chat' has a fill-in-the-middle rate.*whole_loss"),
        ({"mixture": None, "mixture_tokens": {"chat": 90}, "weigh_by": "loss-tokens"}, "weigh_by = .*amounts"),
        ({"mixture": None, "adjust": {"chat": 0.5}, "weigh_by": "loss-tokens"}, "weigh_by = .*shares of samples"),
        (
            {"mixture": None, "blend": [{"weight": 1, "like": "pre"}], "weigh_by": "loss-tokens"},
            "weigh_by = .*shares of samples",
        ),
        ({"objective": "language-modelling", "whole_loss": ["text"]}, "whole_loss needs objective"),
        ({"objective": "language-modelling", "weigh_by": "loss-tokens"}, "weigh_by = 'loss-tokens' needs objective"),
        ({"objective": "instructions"}, "objective"),
    ],
)  # fmt: skip
def test_stages_that_cannot_be_carried_out_are_refused_by_name(corpora: Path, over: dict[str, Any], words: str) -> None:
    stage = {key: value for key, value in (SFT | over).items() if value is not None}
    with pytest.raises(ConfigError, match=f"(?s)sft.*{words}|{words}"):
        resolved(corpora, {"name": "pre", "samples": 40, "mixture": {"text": 1}}, stage)


def test_fill_in_the_middle_of_a_whole_source_is_allowed(corpora: Path) -> None:
    run = resolved(corpora, SFT | WHOLE | {"fim": {"prose": 0.5}})
    assert run.schedule.stages[0].fim.keys() == {"prose"}


def test_a_source_of_files_with_and_without_masks_is_refused(corpora: Path) -> None:
    both = {"chat": {"data": [str(corpora / "chat"), str(corpora / "prose")], "allow_overlap": True}}
    with pytest.raises(ConfigError, match="source 'chat' has no loss mask .or a file of it has none"):
        resolved(corpora, SFT, sources=both)


def test_a_source_of_whose_tokens_none_counts_is_refused(corpora: Path) -> None:
    write_masked(corpora / "chat", [(ids, [1] + [0] * (len(ids) - 1)) for ids, _ in MASKED["chat"]])
    for over in ({}, {"weigh_by": "loss-tokens"}):
        with pytest.raises(ConfigError, match="source 'chat': the loss is on none of the .* tokens"):
            resolved(corpora, SFT | over)


def test_a_damaged_mask_is_found_before_the_first_step(corpora: Path) -> None:
    mask = corpora / "chat.mask"
    mask.write_bytes(bytes([mask.read_bytes()[0] ^ 1]) + mask.read_bytes()[1:])
    later = [{"name": "pre", "samples": 40, "mixture": {"text": 1}}, SFT]
    with pytest.raises(DataError, match=r"chat\.mask"):
        resolved(corpora, *later).stream()
    resolved(corpora, later[0]).stream()  # where nothing reads it, it is nobody's business


# -- the past ----------------------------------------------------------------------------------------------------------


def begun(folder: Path, *stages: dict[str, Any], samples: int) -> Ledger:
    run = resolved(folder, *stages)
    stream = run.stream()
    while stream.consumed_samples < samples:
        stream.next_batch()
    return Ledger.from_json(json.loads(json.dumps(run.ledger.to_json())))


def other_masks(folder: Path) -> None:
    """The same tokens, and other bits."""
    before = IndexedDataset(folder / "chat").fingerprint
    write_masked(folder / "chat", [(ids, [1] * len(ids)) for ids, _ in MASKED["chat"]])
    assert IndexedDataset(folder / "chat").fingerprint == before


def test_M5_a_changed_mask_under_a_begun_stage_is_a_changed_past(corpora: Path) -> None:
    for over in ({}, {"weigh_by": "loss-tokens"}):
        write_masked(corpora / "chat", MASKED["chat"])
        ledger = begun(corpora, SFT | over, samples=8)
        resolved(corpora, SFT | over, ledger=ledger)
        other_masks(corpora)
        with pytest.raises(
            ChangedPastError, match="stage 'sft': its loss mask of source 'chat' was [0-9a-f]{64} and is"
        ):
            resolved(corpora, SFT | over, ledger=ledger)


def test_M5_a_mask_that_no_begun_stage_read_may_change(corpora: Path) -> None:
    pre = {"name": "pre", "samples": 40, "mixture": {"chats": 1}}
    ledger = begun(corpora, pre, SFT, samples=8)
    other_masks(corpora)
    resolved(corpora, pre, SFT, ledger=ledger)
    resolved(corpora, pre, SFT | {"objective": "language-modelling"}, ledger=ledger)


@pytest.mark.parametrize(
    ("over", "words"),
    [
        (
            {"objective": "language-modelling", "whole_loss": []},
            "objective was instruction and is now language-modelling",
        ),
        ({"whole_loss": ["text", "chat"]}, r"whole_loss was \['prose'\] and is now \['chat', 'prose'\]"),
        ({"weigh_by": "loss-tokens"}, "weigh_by was samples and is now loss-tokens"),
    ],
)
def test_M5_what_a_begun_stage_learns_is_past(corpora: Path, over: dict[str, Any], words: str) -> None:
    ledger = begun(corpora, SFT | WHOLE, samples=8)
    resolved(corpora, SFT | WHOLE | {"whole_loss": ["prose"]}, ledger=ledger)  # the same in other words
    with pytest.raises(ChangedPastError, match=words):
        resolved(corpora, SFT | WHOLE | over, ledger=ledger)


def test_M5_masks_that_are_gone_are_named(corpora: Path) -> None:
    ledger = begun(corpora, SFT, samples=8)
    manifest = json.loads((corpora / "chat.json").read_text())
    del manifest["loss_mask"]
    (corpora / "chat.json").write_text(json.dumps(manifest))
    with pytest.raises(ChangedPastError, match=r"loss mask of source 'chat' was [0-9a-f]{64} and is now none"):
        resolved(corpora, SFT, ledger=ledger)


def test_a_begun_stage_is_never_counted_again(corpora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = SFT | {"weigh_by": "loss-tokens", "mixture": {"chat": 5, "codechat": 3}}
    ledger = begun(corpora, stage, samples=8)
    weights = resolved(corpora, stage).schedule.stages[0].weights
    monkeypatch.setattr("megatron.data.source_files.SourceFiles.loss_tokens", None)
    assert resolved(corpora, stage | {"samples": 80}, ledger=ledger).schedule.stages[0].weights == weights


def test_ledgers_from_before_there_were_objectives_are_read(corpora: Path) -> None:
    pre = {"name": "pre", "samples": 40, "mixture": {"chats": 1}}
    record = begun(corpora, pre, samples=8).to_json()
    assert record["stages"][0].pop("objective") == {}
    ledger = Ledger.from_json(json.loads(json.dumps(record)))
    resolved(corpora, pre, ledger=ledger)
    with pytest.raises(ChangedPastError, match="objective was language-modelling and is now instruction"):
        resolved(corpora, pre | {"objective": "instruction"}, ledger=ledger)


# -- nodes of a study --------------------------------------------------------------------------------------------------


def node(folder: Path, stage: dict[str, Any]) -> str:
    config = config_of(folder, stage)
    run = resolve_run(config)
    return hash_of(train_document(TrainStep("sft", "sft", "arm", config, run, 0, None), 7, None, None))


def test_a_node_is_known_by_the_masks_that_it_reads_and_by_nothing_else_of_its_objective(corpora: Path) -> None:
    plain = SFT | {"objective": "language-modelling"}
    unread, read = node(corpora, plain), node(corpora, SFT)
    assert unread != read
    assert node(corpora, SFT | {"whole_loss": ["chats"]}) == unread, "all of it is learned either way"
    assert node(corpora, SFT | {"whole_loss": ["text"]}) == read, "it has no weight"
    assert node(corpora, SFT | {"weigh_by": "loss-tokens", "mixture": {"chat": 1, "codechat": 1}}) != node(
        corpora, SFT | {"mixture": {"chat": 1, "codechat": 1}}
    )
    other_masks(corpora)
    assert node(corpora, plain) == unread and node(corpora, SFT) != read


def test_two_ledgers_differ_in_what_their_stages_learn(corpora: Path) -> None:
    one = begun(corpora, SFT, samples=8)
    other_masks(corpora)
    other = begun(corpora, SFT, samples=8)
    (found,) = differences(one, other)
    assert found.what == "stages.sft.objective" and "loss mask of source 'chat'" in found.words
    assert same_samples(one, other), "the inputs are the same"


def test_padded_stages_count_what_their_samples_hold(corpora: Path) -> None:
    """Of a document, cut at 24 places, the targets of those places; a sample each."""
    stage = SFT | {"weigh_by": "loss-tokens", "mixture": {"chat": 5, "codechat": 3}}
    run = resolved(corpora, stage | {"packing": "padded", "too_long": "truncate", "seq_length": 24})
    needed = {}
    for name, asked in (("chat", 5), ("codechat", 3)):
        held = set(run.sources[name].opened().held_out_documents().tolist())
        kept = [bits for number, (_, bits) in enumerate(MASKED[name]) if number not in held]
        needed[name] = asked / Fraction(sum(sum(bits[1:25]) for bits in kept), len(kept))
    for name, share in shares(run).items():
        assert abs(share - needed[name] / sum(needed.values())) <= Fraction(1, 10**6)
