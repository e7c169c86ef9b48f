"""The choice of precision: what is asked for runs or is refused; what is measured is told and disturbs nothing."""

from __future__ import annotations

import pytest
import torch

from megatron.config.errors import ConfigError, UnavailableError
from megatron.config.model_shape import resolve_model
from megatron.config.schema import ModelSection
from megatron.engines import precision
from megatron.engines.precision import choose_precision

CPU = torch.device("cpu")
SHAPE = resolve_model(ModelSection(preset="llama-tiny", seq_length=32), 100)


@pytest.mark.parametrize("asked", ["fp32", "fp64"])
def test_what_is_asked_for_is_taken_without_measuring(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_measure", lambda *_: pytest.fail("measured"))
    choice = choose_precision(asked, SHAPE, 2, 32, CPU)
    assert choice.name == asked and "asked for" in choice.reason


def test_auto_measures_and_leaves_random_state_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bf16_support", lambda _: None)
    before = torch.get_rng_state()
    choice = choose_precision("auto", SHAPE, 2, 32, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert set(choice.milliseconds) == {"fp32", "bf16"} and "measured" in choice.reason and "ms" in choice.reason


@pytest.mark.parametrize(("bf16", "expected"), [(50.0, "bf16"), (95.0, "bf16"), (96.0, "fp32"), (300.0, "fp32")])
def test_auto_takes_bf16_only_where_it_pays(bf16: float, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bf16_support", lambda _: None)
    monkeypatch.setattr(precision, "_measure", lambda *_: {"fp32": 100.0, "bf16": bf16})
    assert choose_precision("auto", SHAPE, 2, 32, CPU).name == expected


def test_T3_bf16_that_cannot_run_is_refused_and_auto_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bf16_support", lambda _: "this CPU lacks it")
    with pytest.raises(UnavailableError, match=r"this CPU lacks it; set train\.precision"):
        choose_precision("bf16", SHAPE, 2, 32, CPU)
    choice = choose_precision("auto", SHAPE, 2, 32, CPU)
    assert choice.name == "fp32" and "this CPU lacks it" in choice.reason


def test_an_unknown_precision_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="fp16"):
        choose_precision("fp16", SHAPE, 2, 32, CPU)
