"""Paper A's studies: arms and shares as published; the three orders of tuning take the same instructions, each once."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections import Counter
from decimal import Decimal
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import write_corpus
from masked_runs import write_masked
from study.made_studies import write
from study.run_studies import train_here

from megatron.commands.ledger import main as ledger_main
from megatron.commands.preprocess_data import main as preprocess_main
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.ledger import Ledger
from megatron.data.loss_mask import LossMask
from megatron.data.samples import Sample
from megatron.data.sources import TokenizerIdentity
from megatron.planner.hardware import find_accelerator
from megatron.planner.resolve import resolve_run
from megatron.study.costs import node_times
from megatron.study.node_config import end_checkpoint, node_folder
from megatron.study.plan import PlannedStudy, plan_study, study_plan
from megatron.study.steps import TrainStep
from megatron.tokenizers.byte_level import ByteTokenizer

STUDIES = Path(__file__).resolve().parents[2] / "examples" / "studies"
PAPER_A = STUDIES / "paper-a"
ARMS = ("NN", "NC", "CN", "CC", "uniform", "increase", "decrease")
ORDERS = ("uniform", "increase", "decrease")
# by arm and phase, text to code, as published
PUBLISHED = {
    "uniform": [(5, 3)] * 4,
    "increase": [(7, 3), (7, 3), (6, 4), (5, 5)],
    "decrease": [(5, 5), (6, 4), (7, 3), (7, 3)],
}
SAMPLES, BATCH = 320, 8
TEXT, CODE = "text_instructions", "code_instructions"
EOD = ByteTokenizer().eod_id


def words_of(name: str) -> dict[str, Any]:
    return tomllib.loads((PAPER_A / name).read_text(encoding="utf-8"), parse_float=Decimal)


# -- as planned --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> PlannedStudy:
    """The toy with sizes instead of files: about what examples/demo and gather_instructions.py come to."""
    words = words_of("toy.toml")
    sizes = {"text": (4_200_000, None), "python": (3_700_000, None), TEXT: (930_000, 7_900), CODE: (1_500_000, 7_000)}
    for source, (tokens, documents) in sizes.items():
        table = words["base"]["sources"][source]
        del table["data"]
        table |= {"tokens": tokens} if documents is None else {"tokens": tokens, "documents": documents}
    words["base"]["model"]["vocab_size"] = 4096
    del words["results"]  # which files are asked about is no part of a plan
    return plan_study(write(tmp_path_factory.mktemp("toy"), words))


@pytest.fixture(scope="module")
def planned(toy: PlannedStudy) -> dict[str, PlannedStudy]:
    return {"toy": toy} | {name: plan_study(PAPER_A / f"{name}.toml") for name in ("one-gpu", "full")}


def stages_of(study: PlannedStudy) -> dict[str, list[tuple[str, str]]]:
    """By arm, its stages and their mixtures in words."""
    return {row["name"]: [(one["label"], one["words"]) for one in row["stages"]] for row in study_plan(study)["arms"]}


@pytest.mark.parametrize("name", ["toy", "one-gpu"])
def test_smaller_studies_have_the_arms_of_the_full_one(planned: dict[str, PlannedStudy], name: str) -> None:
    assert tuple(stages_of(planned["full"])) == ARMS
    assert stages_of(planned[name]) == stages_of(planned["full"])


@pytest.mark.parametrize("name", ["toy", "one-gpu", "full"])
def test_every_study_is_tuned_as_the_paper_did(planned: dict[str, PlannedStudy], name: str) -> None:
    """Padded, the loss on answers, a fresh optimizer; a third of pre-training is code; what both tunings take, 5:3 of
    samples, is what each order takes."""
    study = planned[name]
    steps = {node.label: node.step for node in study.graph.nodes.values() if isinstance(node.step, TrainStep)}
    for label in ("tune-text", "tune-code", *ORDERS):
        step = steps[label]
        assert step.section.objective == "instruction" and step.stage.documents is not None
        assert step.section.weigh_by == "samples" and step.section.take.optimizer == "fresh"
        law = step.section.lr
        assert law is not None and law.shape == "cosine" and law.final is not None, label
        assert law.peak == pytest.approx(20 * law.final), label
    assert dict(stages_of(study)["CC"])["pretrain-code"] == "text 66.67 %, python 33.33 %"
    (same,) = study_plan(study)["same_aggregate"]
    assert same["arms"] == ORDERS
    tunings = steps["tune-text"].stage.samples, steps["tune-code"].stage.samples
    assert (same["samples"][TEXT], same["samples"][CODE]) == tunings
    assert 3 * tunings[0] == 5 * tunings[1]


def test_the_toy_trains_14_million_tokens_once(toy: PlannedStudy) -> None:
    """Two pre-trainings of 500 steps; two tunings of 300, two of 180, three of 480; 4096 places each."""
    assert toy.graph.trained == (2 * 500 + 2 * 300 + 2 * 180 + 3 * 480) * 4096
    assert toy.graph.naive == (7 * 500 + 2 * 300 + 2 * 180 + 3 * 480) * 4096


@pytest.mark.parametrize("name", ["toy", "one-gpu", "full"])
def test_nothing_is_rounded_repeated_or_lost(planned: dict[str, PlannedStudy], name: str) -> None:
    plan = study_plan(planned[name])
    assert plan["lost"] == [] and plan["same_arms"] == []
    texts = [row["text"] for row in plan["warnings"]]
    rounded = [text for text in texts if "whole batches" in text and "pretrain" not in text]
    assert rounded == [] and not [text for text in texts if "epochs" in text or "repeated" in text]


def test_the_toy_has_paper_bs_model_corpora_and_tokenizer() -> None:
    a, b = (
        words_of("toy.toml")["base"],
        tomllib.loads((STUDIES / "paper-b" / "toy.toml").read_text(encoding="utf-8"), parse_float=Decimal)["base"],
    )
    ours, theirs = a.pop("sources"), b.pop("sources")
    assert a == b
    assert {name: ours[name]["data"] for name in theirs} == {name: theirs[name]["data"] for name in theirs}


def test_one_gpu_fits_an_h200_and_a_day(planned: dict[str, PlannedStudy]) -> None:
    times, notes = node_times(planned["one-gpu"].graph, find_accelerator("h200"), 1)
    assert not notes and sum(one.gpu_hours for one in times.values()) < 24


def test_prompts_of_the_toy_are_what_its_template_gives(tmp_path: Path) -> None:
    """What a node is asked is what a record of tuning is up to its answer, as preprocess_data writes it."""
    lines = (PAPER_A / "instructions.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    assert len(prompts) == len(set(prompts)) == 6
    with (tmp_path / "records.jsonl").open("w", encoding="utf-8") as records:
        for prompt in prompts:
            _, instruction, given = prompt.removesuffix("\n\n### Response:").split("\n\n### ")
            record = {"instruction": instruction.partition("\n")[2], "input": given.partition("\n")[2], "output": "x"}
            records.write(json.dumps(record) + "\n")
    command = ["--format", "chat", "--chat-template", "alpaca", "--tokenizer", "bytes"]
    command += ["--input", str(tmp_path / "records.jsonl"), "--output-prefix", str(tmp_path / "made")]
    assert preprocess_main(command) == 0
    made = IndexedDataset(tmp_path / "made")
    bits = LossMask.open(tmp_path / "made", made.manifest)
    for number, prompt in enumerate(prompts):
        start, length = made.document_start(number), made.document_length(number)
        unlearned = int(np.flatnonzero(bits.bits(start, start + length))[0])
        assert bytes(made.tokens(number, 0, unlearned).astype(np.uint8)).decode() == prompt


# -- as run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> PlannedStudy:
    """The toy's own stages and arms over documents of a few tokens, run by stand-ins that learn nothing: the order of
    samples, ledgers and checkpoints are real."""
    folder = tmp_path_factory.mktemp("small")
    words = words_of("toy.toml")
    for seed, (name, count) in enumerate({"text": 150, "python": 120}.items()):
        write_corpus(folder / name, count, seed)
    for seed, (name, count) in enumerate({TEXT: 260, CODE: 190}.items()):
        write_masked(folder / name, answers(seed, count))
    for name, table in words["base"]["sources"].items():
        table["data"] = [str(folder / name)]
    words["study"]["output"] = str(folder / "out")
    base = words["base"]
    base["tokenizer"]["path"] = "bytes"
    base["data"]["cache"] = str(folder / "cache")
    base["model"] |= {"hidden_size": 48, "num_hidden_layers": 1, "seq_length": 16}
    base["train"] |= {"global_batch_size": 4, "micro_batch_size": 4, "precision": "fp32"}
    for name, stage in words["stages"].items():
        if name.startswith("pretrain"):
            stage["tokens"] = 16 * 60
        else:
            stage |= {"seq_length": 48, "global_batch_size": BATCH}
            size = {"tune-text": SAMPLES * 5 // 8, "tune-code": SAMPLES * 3 // 8}.get(name, SAMPLES)
            stage |= {} if "aggregate_of" in stage else {"samples": size}
        stage["lr"]["warmup"] = "2 steps"
    del words["results"]
    return train_here(write(folder, words))


def answers(seed: int, count: int) -> list[tuple[list[int], list[int]]]:
    """Instructions with answers; one in ten is longer than a sample."""
    generator, made = np.random.default_rng(seed), []
    for number in range(count):
        size = 60 if number % 10 == 0 else int(generator.integers(8, 47))
        ids = [*generator.integers(0, 256, size=size).tolist(), EOD]
        made.append((ids, [0] * (size // 2) + [1] * (len(ids) - size // 2)))
    return made


def tuned(study: PlannedStudy, arm: str) -> list[Sample]:
    """The samples of an arm's last stage in order, as a stream of its node's config gives them."""
    (path,) = [one.path for one in study.graph.arms if one.name == arm]
    config = study.graph.run_config(path[-1], "unused")
    run = resolve_run(config, tokenizer=TokenizerIdentity.of(ByteTokenizer()))
    stage, stream, order = run.schedule.stages[-1], run.stream_from_start(), []
    stream.seek(stage.start_sample)
    while not stream.finished:
        order += stream.next_batch()
    assert len(order) == stage.samples
    return order


def documents_of(samples: list[Sample]) -> list[tuple[str, int]]:
    """Of padded samples, the source and the number of the document that each is."""
    assert all(len(sample.pieces) == 1 and sample.pieces[0].start == 0 for sample in samples)
    return [(sample.source, sample.pieces[0].document) for sample in samples]


def test_the_three_orders_take_the_same_instructions_each_once(small: PlannedStudy) -> None:
    taken = {arm: documents_of(tuned(small, arm)) for arm in (*ORDERS, "CN", "CC")}
    whole = Counter(taken["CN"] + taken["CC"])
    assert max(whole.values()) == 1 and len(whole) == SAMPLES
    for arm in ORDERS:
        assert Counter(taken[arm]) == whole, arm
        # whatever the order between the two sources, each is read in its own
        for source, alone in ((TEXT, "CN"), (CODE, "CC")):
            assert [one for one in taken[arm] if one[0] == source] == taken[alone]
    assert len({tuple(taken[arm]) for arm in ORDERS}) == 3


@pytest.mark.parametrize("arm", ORDERS)
def test_phases_have_the_published_shares(small: PlannedStudy, arm: str) -> None:
    """Counts of each quarter are exact: they are whole numbers."""
    sources = [source for source, _ in documents_of(tuned(small, arm))]
    quarter = SAMPLES // 4
    for phase, (text, code) in enumerate(PUBLISHED[arm]):
        counts = Counter(sources[phase * quarter : (phase + 1) * quarter])
        assert counts == {TEXT: quarter * text // (text + code), CODE: quarter * code // (text + code)}
    # and at no place of a phase is a source a whole sample behind its share
    for number, source_counts in enumerate(_running(sources[:quarter]), start=1):
        assert abs(source_counts[TEXT] * sum(PUBLISHED[arm][0]) - number * PUBLISHED[arm][0][0]) < sum(
            PUBLISHED[arm][0]
        )


def _running(sources: list[str]) -> list[Counter[str]]:
    counts: Counter[str] = Counter()
    found = []
    for source in sources:
        counts[source] += 1
        found.append(Counter(counts))
    return found


def ledger_of(study: PlannedStudy, arm: str) -> Ledger:
    (path,) = [one.path for one in study.graph.arms if one.name == arm]
    state = json.loads((end_checkpoint(study, path[-1]) / "state.json").read_text(encoding="utf-8"))
    return Ledger.from_json(state["data"])


def check_same_aggregate(found: dict[str, Any], samples: dict[str, int]) -> None:
    """What `ledger diff --json` found: the same totals of every source, in another order, and none beyond an epoch."""
    assert not found["same"]
    totals = {key: Counter[str]() for key in ("samples_a", "samples_b", "tokens_a", "tokens_b")}
    for row in found["rows"]:
        for key, total in totals.items():
            total[row["source"]] += row[key]
        assert row["epochs_a"] <= 1 and row["epochs_b"] <= 1
    assert totals["samples_a"] == totals["samples_b"] and totals["tokens_a"] == totals["tokens_b"]
    assert {name: totals["samples_a"][name] for name in samples} == samples


@pytest.mark.parametrize(("a", "b"), list(combinations(ORDERS, 2)))
def test_ledger_diff_proves_it(small: PlannedStudy, capsys: pytest.CaptureFixture[str], a: str, b: str) -> None:
    """`stagemix ledger diff --json` of two nodes' folders: equal samples and tokens of every source, another order,
    which begins in tuning."""
    paths = {one.name: one.path for one in small.graph.arms}
    folders = [str(node_folder(small, paths[arm][-1]).path) for arm in (a, b)]
    assert ledger_main(["diff", *folders, "--json"]) == 5
    found = json.loads(capsys.readouterr().out)
    assert found["same_aggregate"] and found["beyond_order"] == []
    assert not any(count for side in "ab" for count in found[side]["repeated"].values())
    assert ledger_main(["diff", *folders]) == 5
    said = capsys.readouterr().out
    assert "the same aggregate" in said and "besides order and amounts: nothing differs" in said
    assert "A: 0 tokens trained on twice" in said and "B: 0 tokens trained on twice" in said
    check_same_aggregate(found, {TEXT: SAMPLES * 5 // 8, CODE: SAMPLES * 3 // 8})
    assert ledger_of(small, a).order != ledger_of(small, b).order
    (trunk,) = {stage.samples for arm in (a, b) for stage in ledger_of(small, arm).stages[:1]}
    assert found["parting"]["known"] and trunk <= found["parting"]["sample"] < trunk + SAMPLES


@pytest.mark.parametrize("arm", ORDERS)
def test_nothing_is_seen_twice_and_what_is_left_out_is_counted(small: PlannedStudy, arm: str) -> None:
    """By the ledger: less than an epoch of each; tokens of documents that are longer than a sample are skipped."""
    ledger = ledger_of(small, arm)
    for name in (TEXT, CODE):
        record, use = ledger.sources[name], ledger.stages[-1].use[name]
        assert record.epochs <= 1
        assert record.lifetime_tokens == use.tokens + use.skipped and use.skipped > 0
        assert use.tokens + use.padding == use.samples * 48


# -- as trained --------------------------------------------------------------------------------------------------------


def learned_of(result: dict[str, Any], source: str) -> float:
    return float(result["loss"][source]["targets_loss"])


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_tiny_toy_is_tuned_for_real(repository: Path, tmp_path: Path) -> None:
    """Corpora to report, as a user runs it: ledgers of real checkpoints, and losses of what the tunings were of."""
    command = [sys.executable, str(repository / "examples" / "studies" / "run_toy.py"), "--scale", "tiny"]
    done = subprocess.run([*command, "--study", "tuning"], cwd=tmp_path, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    study = tmp_path / "study-toy-tiny" / "tuning"
    results = {path.parent: json.loads(path.read_text(encoding="utf-8")) for path in study.glob("nodes/*/results.json")}
    assert len(results) == 9
    ends = {arm: folder for folder, result in results.items() for arm in result["arms"]}
    assert set(ends) == set(ARMS)

    for a, b in combinations(ORDERS, 2):
        command = [
            sys.executable,
            "-m",
            "megatron.commands.cli",
            "ledger",
            "diff",
            str(ends[a]),
            str(ends[b]),
            "--json",
        ]
        diff = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120)
        assert diff.returncode == 5, diff.stderr
        check_same_aggregate(json.loads(diff.stdout), {TEXT: 200, CODE: 120})

    # of held-out instructions, the answers alone: each tuning is better at its own than what it began with
    (before,) = [result for result in results.values() if result["label"] == "pretrain-code"]
    of_text, of_code = learned_of(before, TEXT), learned_of(before, CODE)
    assert learned_of(results[ends["CN"]], TEXT) < of_text and learned_of(results[ends["CC"]], CODE) < of_code
    for arm in ORDERS:
        assert learned_of(results[ends[arm]], TEXT) < of_text and learned_of(results[ends[arm]], CODE) < of_code
    said = [json.loads(line) for line in (ends["CC"] / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(said) == 6
    assert all((study / name / "index.html").exists() for name in ("report", "report-uniform"))
