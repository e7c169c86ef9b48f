"""Precision and kernels: measured once, kept by the checkpoint, made anew only where they cannot run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made_runs import run_config

from megatron.config.errors import ConfigError, UnavailableError
from megatron.config.model_shape import resolve_model
from megatron.config.schema import KernelsSection, ModelSection, RunConfig
from megatron.engines.base import KernelChoice
from megatron.kernels.choice import Kernels
from megatron.trainer import chosen
from megatron.trainer.job import OneProcess

SHAPE = resolve_model(ModelSection(preset="llama-tiny", seq_length=16), 64)
STAGES = [{"name": "all", "steps": 2, "mixture": {"text": 1}}]


def config_of(**sections: Any) -> RunConfig:
    sources = {"prose": {"group": "text", "tokens": "1M"}}
    train = {"global_batch_size": 2, "precision": "fp32"} | sections.pop("train", {})
    return run_config(
        Path("."), sources, STAGES, model={"preset": "llama-tiny", "seq_length": 16}, train=train, **sections
    )


def kernels(config: RunConfig, kept: Kernels | None = None, processes: int = 1) -> KernelChoice:
    found: Any = None
    if kept is not None:
        found = SimpleNamespace(state={"kernels": asdict(KernelChoice(asdict(kept), "measured long ago"))})
    job: Any = OneProcess()
    job.who = SimpleNamespace(world_size=processes, local_rank=0)
    return chosen._kernels(config, SHAPE, "bf16", found, job)


def test_T2_what_a_checkpoint_kept_is_used_again_without_a_clock() -> None:
    kept = Kernels(norm="compile", compile_layers=True)
    assert kernels(config_of(), kept) == KernelChoice(asdict(kept), "measured long ago")


def test_what_is_asked_for_now_wins_over_what_was_kept() -> None:
    choice = kernels(
        config_of(kernels={"norm": "eager", "compile": "none"}), Kernels(norm="compile", compile_layers=True)
    )
    assert choice.kernels["norm"] == "eager" and not choice.kernels["compile_layers"]


def test_T3_what_cannot_run_here_is_chosen_anew_and_said() -> None:
    choice = kernels(config_of(), Kernels(attention="varlen"))
    assert choice.kernels["attention"] == "blockwise"
    assert "what the checkpoint kept is left: kernels.attention = varlen cannot run here" in choice.reason


@pytest.mark.parametrize(
    ("asked", "names", "same"),
    [
        ({}, Kernels(), True),
        ({"norm": "triton"}, Kernels(), False),
        ({"compile": "layers"}, Kernels(), False),
        ({"compile": "none"}, Kernels(), True),
        ({"compile": "layers"}, Kernels(compile_layers=True), True),
        ({"fp8": True}, Kernels(), False),
        ({"product": "onednn"}, Kernels(product="onednn"), True),
    ],
)
def test_what_is_asked_for_is_compared_by_operation(asked: dict[str, Any], names: Kernels, same: bool) -> None:
    assert chosen._is_asked_for(KernelsSection.model_validate(asked), asdict(names)) is same


@pytest.mark.parametrize(
    ("sections", "processes", "words"),
    [
        ({}, 2, "2 processes"),
        ({"parallel": {"engine": "deepspeed"}}, 1, "parallel.engine = deepspeed"),
        ({"train": {"gradients": "bf16"}}, 1, "train.gradients = bf16"),
        ({"kernels": {"attention": "varlen"}}, 1, "kernels.attention = varlen"),
    ],
)
def test_graphs_are_refused_where_they_were_not_meant_for(sections: dict[str, Any], processes: int, words: str) -> None:
    asked = sections | {"kernels": sections.get("kernels", {}) | {"cuda_graphs": True}}
    with pytest.raises(ConfigError, match=f"kernels.cuda_graphs = true does not go with {words}"):
        kernels(config_of(**asked), processes=processes)


def test_graphs_without_a_gpu_and_fp8_on_several_processes_are_refused() -> None:
    with pytest.raises(UnavailableError, match="kernels.cuda_graphs = true cannot run here: it needs a GPU"):
        kernels(config_of(kernels={"cuda_graphs": True}))
    with pytest.raises(ConfigError, match="kernels.fp8 = true is for one process, and there are 2"):
        kernels(config_of(kernels={"fp8": True}), processes=2)


@pytest.mark.parametrize("kept", [Kernels(fp8=True), Kernels(cuda_graphs=True)], ids=["fp8", "cuda_graphs"])
def test_what_a_checkpoint_kept_is_refused_as_a_new_run_would_be(kept: Kernels) -> None:
    asked = {"fp8": kept.fp8, "cuda_graphs": kept.cuda_graphs}
    with pytest.raises(UnavailableError, match="cannot run here: it needs a GPU"):
        kernels(config_of(kernels=asked), kept)


def test_a_rank_that_cannot_run_what_rank_0_chose_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks for the decision like all others, and waits for nobody."""
    job: Any = OneProcess()
    job.who = SimpleNamespace(world_size=2, local_rank=0)
    job.share = lambda name, make: asdict(KernelChoice(asdict(Kernels(attention="varlen")), "by another rank"))
    with pytest.raises(
        UnavailableError, match="cannot run on every process: kernels.attention = varlen cannot run here: it is"
    ):
        chosen._kernels(config_of(), SHAPE, "bf16", None, job)
