"""Padded training stages: the laws over random schedules that go from packed to padded and back, and bad input."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import run_config, write_corpus
from masked_runs import chats, write_masked
from token_files import BACKENDS, backend

from megatron.config.errors import ChangedPastError, ConfigError, DataError
from megatron.config.schema import RunConfig
from megatron.data.assembly import IGNORED_TARGET, assemble, loaded_sums
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.data.ledger import Ledger, add_to_order, fingerprint_word
from megatron.data.loader import BatchLoader, read_microbatch
from megatron.data.samples import Sample
from megatron.data.sources import OpenSource, TokenizerIdentity
from megatron.planner.plan import plan_of
from megatron.planner.resolve import ResolvedRun, open_run_sources, resolve_run
from megatron.tokenizers.byte_level import ByteTokenizer

_OPENED: dict[Path, dict[str, OpenSource]] = {}
SIZES = {"a": 12, "b": 30, "c": 7}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("padded")
    for seed, (name, documents) in enumerate(SIZES.items()):
        write_corpus(folder / name, documents, seed, longest=40)
    return folder


def resolved(corpora: Path, stages: list[dict[str, Any]], ledger: Ledger | None = None, **sources: Any) -> ResolvedRun:
    tables = {name: {"data": [str(corpora / name)], "dry": "repeat"} | sources.get(name, {}) for name in SIZES}
    over = {"data": {"cache": str(corpora / "cache")}}
    stages = [dict(stage) for stage in stages]
    identity, config = TokenizerIdentity.of(ByteTokenizer()), run_config(corpora, tables, stages, **over)
    opened = None if sources else _opened(corpora, config)
    return resolve_run(config, ledger=ledger, tokenizer=identity, opened=opened)


def _opened(corpora: Path, config: RunConfig) -> dict[str, OpenSource]:
    """The sources as they are in most tests, opened once."""
    if corpora not in _OPENED:
        _OPENED[corpora] = open_run_sources(config, TokenizerIdentity.of(ByteTokenizer()))
    return _OPENED[corpora]


def taken(run: ResolvedRun, most: int | None = None) -> list[Sample]:
    stream, order = run.stream(), []
    while not stream.finished and (most is None or len(order) < most):
        order += stream.next_batch()
    return order


@st.composite
def schedules(draw: st.DrawFn) -> list[dict[str, Any]]:
    stages = []
    for number in range(draw(st.integers(1, 4))):
        weights = draw(st.dictionaries(st.sampled_from("abc"), st.integers(1, 5), min_size=1))
        stage: dict[str, Any] = {"name": f"s{number}", "mixture": weights, "samples": draw(st.integers(1, 30))}
        stage["global_batch_size"] = draw(st.integers(1, 4))
        if draw(st.booleans()):
            stage |= {"packing": "padded", "too_long": draw(st.sampled_from(["drop", "truncate"]))}
        stage["seq_length"] = draw(st.sampled_from([12, 16, 24, 40]))
        stages.append(stage)
    return stages


def check_documents(run: ResolvedRun, order: list[Sample]) -> None:
    """Each padded sample is a whole document or as much of it as fits; M2 for every input position."""
    seen: Counter[tuple[Any, ...]] = Counter()
    for stage in run.schedule.stages:
        counts: Counter[str] = Counter()
        for number, sample in enumerate(order[stage.start_sample : stage.end_sample], start=1):
            counts[sample.source] += 1
            for name in stage.weights.sources:  # M1
                assert abs(counts[name] - stage.weights.target(name, number)) < 1
            if stage.documents is not None:
                ((_, document, start, end),) = sample.pieces
                length = run.sources[sample.source].opened().files.document_length(document)
                assert start == 0 and end == min(length, stage.seq_length)
                assert end == length or stage.documents.too_long == "truncate"
            seen.update((sample.source, p.epoch, p.document, i) for p in sample.pieces for i in range(p.start, p.end))
    assert max(seen.values()) == 1


def check_ledger(run: ResolvedRun, order: list[Sample]) -> None:
    for stage, record in zip(run.schedule.stages, run.ledger.stages, strict=True):
        samples = order[stage.start_sample : stage.end_sample]
        for name, use in record.use.items():
            mine = [sample for sample in samples if sample.source == name]
            assert use.samples == len(mine)
            assert use.tokens == sum(piece.end - piece.start for sample in mine for piece in sample.pieces)
            assert use.tokens + use.padding == len(mine) * stage.seq_length
    for name, record in run.ledger.sources.items():
        uses = [stage.use[name] for stage in run.ledger.stages if name in stage.use]
        assert record.lifetime_tokens == sum(use.tokens + use.skipped for use in uses)


@settings(deadline=None, max_examples=30)
@given(stages=schedules(), cut=st.floats(0, 1), ranks=st.integers(1, 3), place=st.floats(0, 1))
def test_M1_M2_M3_M5_hold_over_random_schedules(
    corpora: Path, stages: list[dict[str, Any]], cut: float, ranks: int, place: float
) -> None:
    check_laws(corpora, stages, cut, ranks, place)


@pytest.mark.soak
@settings(deadline=None, max_examples=1500)
@given(stages=schedules(), cut=st.floats(0, 1), ranks=st.integers(1, 3), place=st.floats(0, 1))
def test_M1_M2_M3_M5_hold_over_1500_random_schedules(
    corpora: Path, stages: list[dict[str, Any]], cut: float, ranks: int, place: float
) -> None:
    check_laws(corpora, stages, cut, ranks, place)


def check_laws(corpora: Path, stages: list[dict[str, Any]], cut: float, ranks: int, place: float) -> None:
    run = resolved(corpora, stages)
    order = taken(run)
    check_documents(run, order)
    check_ledger(run, order)
    # M5: stopped anywhere and resumed from JSON
    head_run = resolved(corpora, stages)
    head = taken(head_run, int(cut * run.schedule.samples))
    again = resolved(corpora, stages, Ledger.from_json(json.loads(json.dumps(head_run.ledger.to_json()))))
    assert head + taken(again) == order
    assert again.ledger.order == run.ledger.order
    # M3: the ranks' streams, and the sums of what each loads
    words = {name: fingerprint_word(source.fingerprint) for name, source in run.sources.items()}
    sums = [0, 0]
    for rank in range(ranks):
        stream = resolved(corpora, stages).stream()
        while not stream.finished:
            size, length = stream.shape().global_batch_size, stream.shape().seq_length
            mine = range(rank, size, ranks)
            batch = stream.next_batch(set(mine))
            assert all(batch[at].pieces == order[batch[at].number].pieces for at in mine)
            cursors = {sample.source: stream.ledger.sources[sample.source].cursor["cursor"] for sample in batch}
            add_to_order(sums, loaded_sums(batch, mine, cursors, words, length))
        assert stream.ledger.order == run.ledger.order
    assert sums == run.ledger.order
    # The witness reaches any batch without what comes before it.
    stream = resolved(corpora, stages).stream_from_start()
    stage, offset = run.schedule.locate(int(place * (run.schedule.samples - 1)))
    goal = stage.start_sample + offset // stage.global_batch_size * stage.global_batch_size
    stream.seek(goal)
    assert stream.next_batch() == order[goal : goal + stage.global_batch_size]


def test_an_epoch_of_a_padded_stage_is_every_document_once(corpora: Path) -> None:
    """Lengths in epochs are documents, caps too: one sample more than max_epochs = 1 is refused."""
    stage = {"name": "tune", "packing": "padded", "seq_length": 64, "global_batch_size": 1, "mixture": {"b": 1}}
    run = resolved(corpora, [stage | {"epochs": {"source": "b", "count": 1}}], b={"dry": "error"})
    documents = [sample.pieces[0].document for sample in taken(run)]
    lengths = run.sources["b"].opened().files.document_lengths(np.arange(SIZES["b"]))
    assert sorted(documents) == np.flatnonzero(lengths > 1).tolist()
    assert run.ledger.sources["b"].epochs == 1
    with pytest.raises(ConfigError, match=r"'b' runs dry: the stage takes 31 documents of it.*max_epochs = 1.04, or"):
        resolved(corpora, [stage | {"samples": len(documents) + 1}], b={"dry": "error"})
    run = resolved(corpora, [stage | {"mixture_epochs": {"b": "0.5", "a": 2}, "mixture": None}])
    counts = Counter(sample.source for sample in taken(run))
    sizes = [run.schedule.stages[0].padded[name].samples for name in "ab"]
    assert [counts["a"], counts["b"]] == [2 * sizes[0], sizes[1] / 2]


def test_a_source_that_runs_dry_by_documents_leaves(corpora: Path) -> None:
    stage = {"name": "tune", "packing": "padded", "seq_length": 64, "samples": 60, "mixture": {"b": 1, "c": 1}}
    run = resolved(corpora, [stage], c={"dry": "renormalise"})
    documents = [sample.pieces[0].document for sample in taken(run) if sample.source == "c"]
    assert len(documents) == len(set(documents)) == run.schedule.stages[0].padded["c"].samples


def test_packed_and_padded_together_are_held_to_the_cap(corpora: Path) -> None:
    """What a packed stage began is skipped by the padded one, so that an epoch holds fewer documents than it has."""
    stages = [
        {"name": "one", "samples": 8, "mixture": {"b": 1}},
        {"name": "two", "packing": "padded", "seq_length": 64, "global_batch_size": 1, "mixture": {"b": 1}},
    ]
    fits = [stages[0], stages[1] | {"samples": 4}]
    run = resolved(corpora, fits, b={"dry": "error"})
    check_documents(run, taken(run))
    with pytest.raises(ConfigError, match=r"'b' runs dry: packed and padded stages together go through 1\.[0-9]+"):
        resolved(corpora, [stages[0], stages[1] | {"samples": 20}], b={"dry": "error"})


@pytest.mark.parametrize("name", BACKENDS)
def test_a_row_is_a_document_and_padding_that_nothing_learns_from(corpora: Path, name: str) -> None:
    with backend(name):
        check_rows(corpora)


def check_rows(corpora: Path) -> None:
    stage = {"name": "tune", "packing": "padded", "seq_length": 64, "samples": 8, "mixture": {"a": 1, "b": 1}}
    run = resolved(corpora, [stage])
    samples = taken(run)
    batch = read_microbatch(samples, run.sources, 64)
    for row, sample in enumerate(samples):
        source, (_, document, _, end) = run.sources[sample.source], sample.pieces[0]
        ids = source.opened().files.tokens(document, 0, end)
        assert batch.tokens[row, :end].tolist() == ids.tolist()
        assert batch.tokens[row, end:].tolist() == [256] * (64 - end)  # the tokenizer's end of a document
        assert batch.targets[row].tolist() == [*ids[1:].tolist(), *[IGNORED_TARGET] * (65 - end)]
        assert batch.position_ids[row].tolist() == [*range(end), *range(64 - end)]
        assert batch.document_ids[row].tolist() == [0] * end + [1] * (64 - end)
        one = assemble(sample, source, 64)
        assert one.tokens.tolist() == batch.tokens[row].tolist() and one.targets.tolist() == batch.targets[row].tolist()
    bounds = [row * 64 + place for row, sample in enumerate(samples) for place in (sample.pieces[0].end, 64)]
    assert batch.cu_seqlens.tolist() == sorted({0, *bounds})


def test_batches_count_their_padding(corpora: Path) -> None:
    stage = {"name": "tune", "packing": "padded", "seq_length": 64, "samples": 24, "mixture": {"a": 1, "b": 1}}
    parts: list[list[Any]] = []
    for rank in range(2):
        run = resolved(corpora, [stage | {"global_batch_size": 4}])
        with BatchLoader(run.stream(), run.sources, 2, data_rank=rank, data_size=2) as loader:
            parts.append(list(loader))
    for one, other in zip(*parts, strict=True):
        assert one.padding == other.padding and one.tokens == other.tokens == 256
        documents = one.tokens - one.padding
        assert one.valid_targets + other.valid_targets == documents - 4
    uses = run.ledger.stages[0].use.values()
    assert sum(use.padding for use in uses) == sum(batch.padding for batch in parts[0])


# -- what is refused ---------------------------------------------------------------------------------------------------


def padded(**over: Any) -> dict[str, Any]:
    return {"name": "tune", "packing": "padded", "samples": 8, "mixture": {"a": 1}} | over


def test_documents_that_are_too_long_are_named_before_training(corpora: Path) -> None:
    with pytest.raises(DataError) as error:
        resolved(corpora, [padded(seq_length=30)])
    lengths = resolved(corpora, [padded(seq_length=64)]).sources["a"].opened().files.document_lengths(np.arange(12))
    first, longest = int(np.flatnonzero(lengths > 30)[0]), int(lengths.argmax())
    assert f"source 'a': {(lengths > 30).sum()} of its 12 documents are longer than a sample of 30 tokens" in str(
        error.value
    )
    assert f"the first is document {first} with {lengths[first]}, the longest document {longest}" in str(error.value)
    assert f"seq_length to {lengths.max()}" in str(error.value)
    resolved(corpora, [padded(seq_length=30, mixture={"c": 1, "a": 0}, too_long="drop")])


def test_a_source_without_a_document_that_fits_is_refused(corpora: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'a': none of its 12 documents can be a sample: \d+ are longer than 2 tokens"):
        resolved(corpora, [padded(seq_length=2, too_long="drop")])
    with IndexedDatasetWriter(tmp_path / "empty", np.uint16) as writer:
        for _ in range(3):
            writer.add_document([256])
    empty = {"data": [str(tmp_path / "empty")]}
    with pytest.raises(DataError, match="can be a sample: 0 are longer than 16 tokens, and 3 have fewer than 2"):
        resolved(corpora, [padded()], a=empty)


def test_empty_documents_are_skipped_and_counted(corpora: Path, tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "some", np.uint16) as writer:
        for number in range(10):
            writer.add_document([256] if number % 2 else [number, number, 256])
    run = resolved(corpora, [padded(samples=5, global_batch_size=1)], a={"data": [str(tmp_path / "some")]})
    samples = taken(run)
    assert sorted(sample.pieces[0].document for sample in samples) == [0, 2, 4, 6, 8]
    use = run.ledger.stages[0].use["a"]
    assert (use.skipped, use.skipped_documents, use.tokens) == (5, 5, 15)


def test_shapes_pieces_and_sizes_that_padded_stages_cannot_have(corpora: Path) -> None:
    shapes = [{"length": "50%", "seq_length": 32}, {"seq_length": 48}]
    with pytest.raises(ConfigError, match="it is padded, and its shapes have the sequence lengths 32, 48"):
        resolved(corpora, [padded(shapes=shapes, too_long="drop")])
    with pytest.raises(ConfigError, match="seq_length 39 is above its piece_tokens 8"):
        resolved(corpora, [padded(seq_length=39, too_long="drop")], a={"piece_tokens": 8})
    planned = {"data": [], "tokens": 1000}
    with pytest.raises(
        ConfigError, match=r"has only a size in tokens: say how many documents it has \(documents = …\)"
    ):
        resolved(corpora, [padded()], a=planned)
    plan = plan_of(
        resolved(corpora, [padded(epochs={"source": "a", "count": 1}, samples=None)], a=planned | {"documents": 100})
    )
    assert (plan["samples"], plan["tokens"], plan["padding"]) == (100, 1600, 600)


def test_M5_a_begun_stage_keeps_its_packing(corpora: Path) -> None:
    stages = [padded(seq_length=64)]
    run = resolved(corpora, stages)
    taken(run, 4)
    ledger = run.ledger.to_json()
    for change in ({"packing": "packed"}, {"too_long": "truncate"}):
        with pytest.raises(ChangedPastError, match="'tune': its packing was padded, too_long error and is now"):
            resolved(corpora, [stages[0] | change], Ledger.from_json(ledger))
    old = json.loads(json.dumps(ledger))
    for row in old["stages"]:  # as versions before padded stages wrote it
        del row["packing"], row["padded"]
        for use in row["use"].values():
            del use["padding"], use["skipped_documents"], use["truncated"]
    assert Ledger.from_json(old).stages[0].packing == "packed"


def test_weights_by_loss_tokens_go_by_what_a_document_learns(corpora: Path, tmp_path: Path) -> None:
    """5:3 of what is learned; a document that is cut counts as far as it goes, one that is left out not at all."""
    made = {"x": chats(1, 30, 0.2, 60), "y": chats(2, 40, 0.9, 60)}
    for name, documents in made.items():
        write_masked(tmp_path / name, documents)
    for too_long in ("drop", "truncate"):
        stage = padded(
            seq_length=40, samples=1000, too_long=too_long, mixture={"x": 5, "y": 3}, objective="instruction"
        )
        sources = {name: {"data": [str(tmp_path / name)], "dry": "repeat"} for name in made}
        run = resolve_run(run_config(tmp_path, sources, [stage | {"weigh_by": "loss-tokens"}]))
        means = {}
        for name, documents in made.items():
            cut = [(ids, bits) for ids, bits in documents if too_long == "truncate" or len(ids) <= 40]
            # The last place that is kept predicts the token behind it.
            means[name] = float(np.mean([sum(bits[1 : min(len(ids), 40) + 1]) for ids, bits in cut]))
        counts = run.schedule.stages[0].counts
        learned = {name: counts[name] * means[name] for name in made}
        assert learned["x"] / learned["y"] == pytest.approx(5 / 3, rel=0.02), too_long
