"""The studies of both papers at full size, against the published figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron.study.plan import plan_study, study_plan

STUDIES = Path(__file__).resolve().parents[2] / "examples" / "studies"
B = 10**9


@pytest.fixture(scope="module")
def paper_b() -> dict[str, Any]:
    return study_plan(plan_study(STUDIES / "paper-b" / "full.toml"))


@pytest.fixture(scope="module")
def paper_a() -> dict[str, Any]:
    return study_plan(plan_study(STUDIES / "paper-a" / "full.toml"))


def words_of(plan: dict[str, Any], arm: str) -> dict[str, str]:
    (row,) = [row for row in plan["arms"] if row["name"] == arm]
    return {stage["label"]: stage["words"] for stage in row["stages"]}


def test_paper_b_trains_1720_of_5120_billion_tokens(paper_b: dict[str, Any]) -> None:
    """Four arms x three cooldowns: two times 200B each, one first half shared by two arms, eight cooldowns of 40B."""
    (row,) = [row for row in paper_b["experiments"] if row["experiment"] == "stages"]
    assert row["arms"] == 12
    # each of 24 stages is rounded to whole batches of 4.19M tokens
    assert abs(row["naive"] - 5120 * B) < 36 * 4_194_304 / 2
    assert abs(row["trained"] - 1720 * B) < 15 * 4_194_304 / 2
    assert round(row["ratio"], 3) == round(1720 / 5120, 3) == 0.336


def test_paper_b_arms_are_what_was_published(paper_b: dict[str, Any]) -> None:
    assert words_of(paper_b, "code-to-text") == {
        "init-code": "web_code 80 %, markup 20 %",
        "to-text": "text 90 %, web_code 8 %, markup 2 %",
    }
    assert words_of(paper_b, "text") == {"init-text": "text 100 %", "text-on": "text 100 %"}
    tokens = {arm["name"]: arm["tokens"] for arm in paper_b["arms"]}
    for arm in ("text", "balanced", "balanced-to-text", "code-to-text"):
        assert round(tokens[arm] / B) == 400
        for cooldown in ("code", "text"):
            assert round(tokens[f"{arm}-cooldown-{cooldown}"] / B) == 440
    # 8 of 40 are code, of whatever kind
    cooldown = words_of(paper_b, "text-cooldown-code")["cooldown-code"]
    assert "quality_text 80 %" in cooldown
    shares = {arm["name"]: arm["stages"][0]["words"] for arm in paper_b["arms"] if arm["experiment"] == "share"}
    assert len(shares) == 6 and all(round(tokens[name] / B) == 200 for name in shares)
    for share in (25, 50, 75, 90):
        assert f"text {100 - share} %" in shares[f"share-{share}"]
    assert shares["share-0"] == "text 100 %" and "text" not in shares["share-100"]


def test_paper_b_repeats_its_synthetic_code_six_times(paper_b: dict[str, Any]) -> None:
    (row,) = [row for row in paper_b["warnings"] if "synthetic_code is trained on for" in row["text"]]
    assert "6.25 epochs" in row["text"] and row["arms"] == ["quality-synthetic"]


def test_paper_b_loses_no_sharing_and_says_which_arms_are_one(paper_b: dict[str, Any]) -> None:
    assert [row for row in paper_b["lost"] if not row["asked"]] == []
    assert paper_b["same_arms"] == [["share-100", "quality-markup"]]
    shared = {row["label"]: len(row["arms"]) for row in paper_b["shared"]}
    assert shared["init-balanced"] == 6 and shared["init-text"] == shared["init-code"] == 3


def test_paper_a_three_orders_have_one_aggregate(paper_a: dict[str, Any]) -> None:
    (row,) = paper_a["same_aggregate"]
    assert row["arms"] == ("uniform", "increase", "decrease")
    tuning = {name: count for name, count in row["samples"].items() if "instructions" in name}
    assert tuning["text_instructions"] * 3 == tuning["code_instructions"] * 5
    assert not [row for row in paper_a["warnings"] if row["kind"] in ("unequal-control", "lost-sharing", "same-arms")]


def test_paper_a_arms_share_two_pre_trainings(paper_a: dict[str, Any]) -> None:
    shared = {row["label"]: row["arms"] for row in paper_a["shared"]}
    assert shared["pretrain-text"] == ["NN", "NC"]
    assert shared["pretrain-code"] == ["CN", "CC", "uniform", "increase", "decrease"]
    assert len(paper_a["nodes"]) == 2 + 7
    # about 42B tokens, a third of them code
    (code,) = [row for row in paper_a["nodes"] if row["label"] == "pretrain-code"]
    assert abs(code["tokens"] - 41.7 * B) < 0.01 * B and "python 33.33 %" in code["mixture"]
