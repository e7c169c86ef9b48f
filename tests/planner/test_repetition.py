"""Where sources repeat, run dry and are left: against closed forms, and against the stream itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_runs import run_config, write_corpus
from planned_runs import LENGTHS, SIZES, integral, planned, stages

from megatron.planner import positions
from megatron.planner.plan import plan_of
from megatron.planner.plan_warnings import warnings_of
from megatron.planner.resolve import resolve_run

TOKENS_A_STEP = 4 * 16


def of(plan: dict[str, Any], source: str) -> dict[str, Any]:
    return next(row for row in plan["sources"] if row["source"] == source)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    config = planned(tmp_path_factory.mktemp("plan"))
    return plan_of(resolve_run(config), config.stages, config.train.tokens)


def test_epochs_after_each_stage(plan: dict[str, Any]) -> None:
    for source, size in SIZES.items():
        used = 0.0
        for number, name in enumerate(LENGTHS):
            used += integral(name, source, 0, 1)
            assert of(plan, source)["epochs_after"][number] == pytest.approx(used / size, abs=16 / size)


def test_passes_are_where_the_integral_says(plan: dict[str, Any]) -> None:
    marks = {mark["epochs"]: mark for mark in of(plan, "books")["passes"]}
    assert set(marks) == {1, 2, 4}
    begin = LENGTHS["even"] + LENGTHS["ramp"] + 0.25 * LENGTHS["steps"]
    for epochs, mark in marks.items():
        assert mark["stage"] == "steps"
        assert abs(mark["token"] - (begin + epochs * SIZES["books"] / 0.5)) <= 2 * 16
        assert mark["step"] == mark["token"] // TOKENS_A_STEP
        assert mark["sample"] * 16 == mark["token"]
    # python: 12,800 in the first stage, and the rest of its 40,000 inside the ramp, where 0.1 x + 0.3 x^2 of 96,000
    # tokens are 27,200: x = (-0.1 + sqrt(0.01 + 1.2 * 27.2 / 96)) / 0.6
    x = (-0.1 + (0.01 + 1.2 * 27.2 / 96) ** 0.5) / 0.6
    (mark,) = of(plan, "python")["passes"]
    assert (mark["epochs"], mark["stage"]) == (1, "ramp")
    assert abs(mark["token"] - (LENGTHS["even"] + x * LENGTHS["ramp"])) <= 2 * 16
    assert of(plan, "web")["passes"] == [] and of(plan, "rust")["passes"] == []


def test_exactly_one_epoch_passes_nothing(tmp_path: Path) -> None:
    config = run_config(tmp_path, {"a": {"tokens": 6400}}, [{"name": "one", "tokens": 6400, "mixture": {"a": 1}}])
    row = of(plan_of(resolve_run(config)), "a")
    assert row["passes"] == [] and row["epochs_after"] == [1.0] and row["never_seen"] == 0
    assert row["dry_at"]["token"] == 6400 and row["dry_at"]["policy"] == "error"


def test_tokens_and_asked_lengths_add_up(plan: dict[str, Any]) -> None:
    assert sum(row["tokens"] for row in plan["groups"]) == plan["tokens"] == sum(LENGTHS.values())
    for number, stage in enumerate(plan["stages"]):
        assert sum(row["tokens_by_stage"][number] for row in plan["sources"]) == stage["tokens"]
        assert sum(row["tokens_by_stage"][number] for row in plan["groups"]) == stage["tokens"]
        assert stage["asked_tokens"] == LENGTHS[stage["name"]]
        for group in stage["groups"]:
            assert abs(group["error"]) <= group["error_below"]


def test_a_group_stays_below_its_bound_after_every_sample(tmp_path: Path) -> None:
    names = {f"c{n}": "code" for n in range(5)} | {f"t{n}": "text" for n in range(3)}
    sources = {name: {"tokens": 10**6, "group": group} for name, group in names.items()}
    weights = dict(zip(names, (3, 7, 11, 2, 5, 13, 1, 9), strict=True))
    stage = {"name": "one", "samples": 800, "mixture": weights}
    run = resolve_run(run_config(tmp_path, sources, [stage]))
    bounds = {row["group"]: row["error_below"] for row in plan_of(run)["stages"][0]["groups"]}
    assert bounds == {"code": 3, "text": 3}
    from megatron.data.mixture import open_mixture

    resolved = run.schedule.stages[0]
    chosen = open_mixture(resolved.weights, resolved.groups(), horizon=800).take(800).tolist()
    counts = dict.fromkeys(names, 0)
    total = sum(weights.values())
    for done, number in enumerate(chosen, start=1):
        counts[resolved.weights.sources[number]] += 1
        for group in ("code", "text"):
            error = sum(counts[n] - done * weights[n] / total for n in names if names[n] == group)
            assert abs(error) < bounds[group]


@pytest.mark.parametrize("dry", ["renormalise", "repeat", "error"])
def test_a_dry_source_is_where_the_stream_takes_its_last_sample(tmp_path: Path, dry: str) -> None:
    write_corpus(tmp_path / "small", 30, 1)
    write_corpus(tmp_path / "large", 900, 2)
    sources = {
        "small": {"data": [str(tmp_path / "small")], "dry": dry, "max_epochs": 1},
        "large": {"data": [str(tmp_path / "large")]},
    }
    first = resolve_run(run_config(tmp_path, sources, [{"name": "x", "samples": 4, "mixture": {"large": 1}}]))
    room = first.sources["small"].epoch_tokens // 16
    samples = 4 * (room if dry == "renormalise" else room // 2) + 4
    mixture = {"small": 0.5, "large": 0.5} if dry != "error" else {"small": 2 * room, "large": 2 * samples - 2 * room}
    if dry == "error":
        samples = 4 * room
        mixture = {"small": 1, "large": 3}
    run = resolve_run(run_config(tmp_path, sources, [{"name": "x", "samples": samples, "mixture": mixture}]))
    row = of(plan_of(run), "small")
    taken = [sample.number for sample in _all(run) if sample.source == "small"]
    assert row["dry_at"]["policy"] == dry
    # the sample by which the last one that its first epoch holds has been given, to within the law's one sample
    last = taken[room - 1] + 1
    assert abs(row["dry_at"]["sample"] - last) <= 2 / 0.25
    assert row["dry_at"]["token"] == row["dry_at"]["sample"] * 16
    if dry == "renormalise":
        assert len(taken) == room and row["unused"] == first.sources["small"].epoch_tokens % 16
        assert run.schedule.stages[0].weights.weight("small", row["dry_at"]["sample"]) == 0


def _all(run: Any) -> Any:
    stream = run.stream()
    while not stream.finished:
        yield from stream.next_batch()


def test_lengths_that_change_inside_a_stage_move_every_position(tmp_path: Path) -> None:
    """200 samples of 16 tokens in batches of 4, then 200 of 32 in batches of 8."""
    shapes = [{"length": "200 samples"}, {"seq_length": 32, "global_batch_size": 8}]
    stage_words = {"name": "one", "tokens": 200 * 16 + 200 * 32, "mixture": {"a": 0.5, "b": 0.5}, "shapes": shapes}
    sources = {"a": {"tokens": 1_900, "dry": "repeat"}, "b": {"tokens": 10**6}}
    config = run_config(tmp_path, sources, [stage_words])
    run = resolve_run(config)
    (stage,) = run.schedule.stages
    assert stage.samples == 400 and positions.tokens_at(stage, 400) == 200 * 16 + 200 * 32
    assert positions.steps_at(stage, 400) == 200 // 4 + 200 // 8
    assert positions.samples_at(stage, 200 * 16 + 32) == 201
    assert positions.samples_after_steps(stage, 51) == 208
    assert positions.batch_start(stage, 207) == 200 and positions.batch_start(stage, 199) == 196
    plan = plan_of(run, config.stages)
    assert of(plan, "a")["tokens"] == 100 * 16 + 100 * 32
    # one epoch of 1,900: 1,600 by sample 200, and 16 a sample from there on
    (first, second) = of(plan, "a")["passes"]
    assert (first["epochs"], first["sample"], first["token"]) == (1, 219, 200 * 16 + 19 * 32)
    assert (second["epochs"], second["sample"], second["step"]) == (2, 338, 50 + 138 // 8)
    assert plan["stages"][0]["shapes"] == [[0, 200, 16, 4], [200, 400, 32, 8]]
    assert plan["stages"][0]["asked_tokens"] == plan["tokens"]


def warned(folder: Path, change: dict[str, Any], tokenizer: str = "bytes") -> Any:
    config = planned(folder, **change)
    plan = plan_of(resolve_run(config), config.stages, config.train.tokens)
    return warnings_of(plan, tokenizer)


def test_warnings_come_by_gravity_and_name_what_they_mean(tmp_path: Path) -> None:
    found = warned(tmp_path, {}, tokenizer=str(tmp_path / "nowhere.model"))
    assert [row["gravity"] for row in found] == sorted(
        (row["gravity"] for row in found), key=["high", "medium", "low"].index
    )
    kinds = {(row["kind"], row.get("source") or row.get("stage")) for row in found}
    assert ("repetition", "books") in kinds and ("lr-jump", "steps") in kinds
    assert ("lr-jump", "ramp") not in kinds and ("lr-jump", "tail") not in kinds
    assert next(row for row in found if row["kind"] == "repetition")["gravity"] == "high"
    tokenizer = [row for row in found if row.get("exit_code") == 3]
    assert any("nowhere.model" in row["text"] for row in tokenizer)


@pytest.mark.parametrize(
    ("steps", "said"), [(100, None), (101, "a for 1.01 epochs"), (250, "a for 2.50 epochs"), (400, "a for 4 epochs")]
)
def test_more_than_an_epoch_is_said_as_it_is(tmp_path: Path, steps: int, said: str | None) -> None:
    stage = {"name": "s", "steps": steps, "mixture": {"a": 1}, "lr": {"peak": 1e-3}}
    config = run_config(tmp_path, {"a": {"tokens": 6400, "max_epochs": 9}}, [stage])
    found = warnings_of(plan_of(resolve_run(config), config.stages), "bytes")
    texts = [row["text"] for row in found if row["kind"] == "repetition"]
    assert texts == ([f"trained on more than once by the run's end: {said}"] if said else [])


def test_a_batch_more_than_an_epoch_is_not_a_whole_number(tmp_path: Path) -> None:
    stage = {"name": "s", "steps": 1003, "mixture": {"a": 1}, "lr": {"peak": 1e-3}}
    config = run_config(tmp_path, {"a": {"tokens": 64000, "max_epochs": 9}}, [stage])
    (text,) = [
        row["text"]
        for row in warnings_of(plan_of(resolve_run(config), config.stages), "bytes")
        if row["kind"] == "repetition"
    ]
    assert text.endswith("a for 1.0030 epochs")


@pytest.mark.parametrize(
    ("rate", "take", "gravity"),
    [
        ({"peak": 1e-3, "shape": "constant", "warmup": "10 steps"}, {"optimizer": "fresh"}, "low"),
        ({"peak": 1e-3, "shape": "constant", "warmup": "10 steps"}, {}, "medium"),
        ({"peak": 1e-1, "shape": "constant"}, {"optimizer": "fresh"}, "medium"),
    ],
)
def test_a_rate_that_begins_anew_with_its_optimizer_is_no_mishap(
    tmp_path: Path, rate: dict[str, Any], take: dict[str, str], gravity: str
) -> None:
    first = {"name": "first", "steps": 50, "mixture": {"a": 1}, "lr": {"peak": 1e-2, "shape": "constant"}}
    tuned = {"name": "tuned", "steps": 50, "mixture": {"a": 1}, "lr": rate, "take": take}
    config = run_config(tmp_path, {"a": {"tokens": 10**6}}, [first, tuned])
    found = warnings_of(plan_of(resolve_run(config), config.stages), "bytes")
    assert [(row["gravity"], row["stage"]) for row in found if row["kind"] == "lr-jump"] == [(gravity, "tuned")]


def test_what_a_stage_takes_over_has_to_be_there(tmp_path: Path) -> None:
    first = {"name": "first", "steps": 5, "mixture": {"a": 1}, "lr": {"peak": 1e-2}}
    there = {"weights": str(tmp_path), "optimizer": "frsh", "cursors": "continue"}
    config = run_config(tmp_path, {"a": {"tokens": 10**6}}, [first | {"take": there}])
    found = warnings_of(plan_of(resolve_run(config), config.stages), "bytes")
    (row,) = [row for row in found if row["kind"] == "train-refuses" and "take." in row["text"]]
    assert row["gravity"] == "high" and row["stage"] == "first"
    assert "take.optimizer = 'frsh' of stage 'first': it is neither \"continue\" nor \"fresh\"" in row["text"]


def test_a_source_without_a_weight_and_weights_that_are_normalised_are_said(tmp_path: Path) -> None:
    changed = stages()[:1]
    changed[0]["mixture"] = {"python": 1, "web": 3}
    found = warned(tmp_path, {"sections": changed})
    assert {row["source"] for row in found if row["kind"] == "never-used"} == {"rust", "books"}
    assert any(row["kind"] == "normalised" and "sum to 4" in row["text"] for row in found)


def test_fill_in_the_middle_without_sentinels_is_warned_of(tmp_path: Path) -> None:
    config = planned(tmp_path, [{**stages()[0], "fim": {"code": "0.5"}}])
    plan = plan_of(resolve_run(config))
    found = warnings_of(plan, "bytes", has_sentinels=False)
    (row,) = [row for row in found if row.get("exit_code") == 2]
    assert "python, rust" in row["text"] and row["stage"] == "even"
    assert not [row for row in warnings_of(plan, "bytes") if row.get("exit_code") == 2]
