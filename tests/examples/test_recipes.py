"""The published recipes in examples/recipes: planned without data, at their true token counts."""

from __future__ import annotations

import tomllib
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from megatron.config.load import config_from_tables, load_config
from megatron.data.schedule import TrainingStage
from megatron.optim.lr import LRSchedule
from megatron.planner.resolve import resolve_run

RECIPES = Path(__file__).resolve().parents[2] / "examples" / "recipes"
B = 10**9

# published tokens of each stage
LENGTHS = {
    "paper_a_stepwise_increase": [41.7 * B, 0.2 * B],
    "paper_b_balanced_to_text": [200 * B, 200 * B, 40 * B],
    "crystalcoder": [345 * B, 927 * B, 120 * B],
    "smollm2": [6000 * B, 2000 * B, 2000 * B, 1000 * B],
    "llama3": [15_600 * B, 0.04 * B],
    "arctic_snowcoder": [500 * B, 50 * B, 5 * B],
    "nemotron_nano2": [12_000 * B, 4000 * B, 3600 * B, 400 * B],
}


def planned(name: str, *over: str) -> tuple[dict[str, TrainingStage], LRSchedule]:
    run = resolve_run(load_config(RECIPES / f"{name}.toml", over))
    return {stage.name: stage for stage in run.schedule.stages}, run.lr


def shares(stage: TrainingStage, sample: int = 0) -> dict[str, float]:
    return {name: round(float(stage.weights.weight(name, sample)), 4) for name in stage.weights.sources}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_is_planned_at_its_published_length(path: Path) -> None:
    stages, _ = planned(path.stem)
    for stage, tokens in zip(stages.values(), LENGTHS[path.stem], strict=True):
        batch = stage.shapes.steps[-1].batch_tokens
        assert abs(stage.tokens - tokens) <= batch / 2 + len(stage.shapes.steps) * batch


def test_paper_a_three_arms_have_one_aggregate() -> None:
    counts = []
    for arm in ("", "stages.tuning.reverse=increase", "stages.tuning.aggregate_of=['increase']"):
        stages, _ = planned_arm(arm)
        counts.append(stages["tuning"].counts)
        assert Fraction(counts[-1]["text_instructions"], stages["tuning"].samples) == Fraction(5, 8)
    assert counts[0] == counts[1] == counts[2]


def planned_arm(arm: str) -> tuple[dict[str, TrainingStage], LRSchedule]:
    if not arm:
        return planned("paper_a_stepwise_increase")
    text = (RECIPES / "paper_a_stepwise_increase.toml").read_text(encoding="utf-8")
    key, value = arm.removeprefix("stages.tuning.").split("=")
    quoted = value if value.startswith("[") else f'"{value}"'
    assert 'like = "increase"' in text
    changed = text.replace('like = "increase"', f"{key} = {quoted}", 1)
    return planned_text(changed)


def planned_text(text: str) -> tuple[dict[str, TrainingStage], LRSchedule]:
    run = resolve_run(config_from_tables(tomllib.loads(text, parse_float=Decimal)))
    return {stage.name: stage for stage in run.schedule.stages}, run.lr


def test_paper_b_meets_its_tokens_to_the_sample() -> None:
    stages, _ = planned("paper_b_balanced_to_text")
    text = stages["text"]
    assert abs(text.source_tokens["text"] - 180 * B) < 512 * 8192
    assert shares(stages["cooldown"])["quality_text"] == 0.8


def test_crystalcoder_sees_its_code_twice_and_rearranges_nine_tenths_of_it() -> None:
    stages, lr = planned("crystalcoder")
    middle = stages["text and code"]
    assert abs(middle.source_tokens["code"] / (291 * B) - 2) < 0.001
    assert middle.fim["code"].to_json() == ["0.9", "0.5"] and "text_second_half" not in middle.fim
    # stopped early on a law that was written for 294,000 steps
    assert 0.0085 < lr.rate(stages["text"].tokens) < 0.0093


def test_llama3_grows_batch_and_sequences_inside_one_stage() -> None:
    stages, _ = planned("llama3")
    main = stages["main"]
    assert [(step.seq_length, step.global_batch_size) for step in main.shapes.steps] == [
        (4096, 1024), (8192, 1024), (8192, 2048),
    ]  # fmt: skip
    starts = [main.shapes.tokens_at(step.start) for step in main.shapes.steps]
    assert abs(starts[1] - 252e6) < 4096 * 1024 and abs(starts[2] - 252e6 - 2.87e12) < 8192 * 1024


def test_snowcoder_raises_one_language_and_keeps_the_others_in_proportion() -> None:
    stages, _ = planned("arctic_snowcoder")
    best = stages["best, four times"]
    assert best.source_tokens["best_python"] == pytest.approx(4 * 2.5 * B, rel=1e-4)
    assert shares(stages["enhanced"]) == {"best_java": 0.2, "best_other": 0.3, "best_python": 0.5}


def test_nano2_blends_the_third_phase_by_reference() -> None:
    stages, _ = planned("nemotron_nano2")
    assert shares(stages["long documents"]) == {
        "code": 0.176, "good_web": 0.36, "instructions": 0.12, "long_documents": 0.2, "math": 0.144,
    }  # fmt: skip
    assert [step.global_batch_size for step in stages["phase 1"].shapes.steps] == [192, 384, 576, 768]
