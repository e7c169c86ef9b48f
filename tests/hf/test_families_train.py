"""A model that transformers made trains on in ours as it does in transformers: twenty steps, the same losses."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from engines.made_rows import Micro
from hf.family_cases import CASES, WORDS, FamilyCase, made
from ranks import run_ranks
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from megatron.config.layout import resolve_layout
from megatron.config.schema import OptimizerSection, ParallelSection, TrainSection
from megatron.engines.build import build_engine
from megatron.hf.architecture import shape_from_folder
from megatron.hf.import_weights import HuggingFaceTensors
from megatron.parallel.mesh import launched, open_mesh

STEPS, ROWS, LENGTH, EACH = 20, 8, 24, 2
TOLERANCE = 1e-4
ADAMW = OptimizerSection(weight_decay=0.1, clip_grad_norm=1.0)
SGD = OptimizerSection(name="sgd", momentum=0.5, clip_grad_norm=0.0)
RATES = {"adamw": 2e-3, "sgd": 0.05}
ONE_OF_EACH = (
    "llama 3", "mistral with a window", "qwen2 tied", "qwen3", "olmo3", "phi3 partial, tied", "gpt_neox",
    "gpt2", "gemma3 with windows", "cohere",
)  # fmt: skip


def _tokens(step: int) -> torch.Tensor:
    """Four batches, again and again, so that there is something to learn."""
    return torch.randint(0, WORDS, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step % 4))


def _microbatches(step: int, rank: int, size: int) -> list[Micro]:
    """Data rank `rank` of `size`'s rows, of one document each, since transformers knows no other."""
    tokens, numbers = _tokens(step), torch.arange(ROWS) + step * ROWS
    one = torch.zeros(ROWS, LENGTH, dtype=torch.int32)
    whole = (
        tokens[:, :-1].contiguous(),
        tokens[:, 1:].contiguous(),
        one,
        torch.zeros(ROWS, dtype=torch.int64),
        numbers,
    )
    return [
        Micro(*(part[first : first + EACH] for part in whole))
        for first in range(rank * ROWS // size, (rank + 1) * ROWS // size, EACH)
    ]


def losses_here(
    world_size: int, parallel: dict[str, Any], folders: dict[str, Path], optimizer: OptimizerSection
) -> dict[str, list[float]]:
    """The body of a rank: by model, the loss of each step through the real engine."""
    section, train = ParallelSection(**parallel), TrainSection(global_batch_size=ROWS, micro_batch_size=EACH)
    mesh = open_mesh(resolve_layout(section, world_size), launched(), 60)
    found = {}
    for name, folder in folders.items():
        shape = shape_from_folder(folder)
        engine = build_engine(shape, optimizer, section, train, 5, "fp32", mesh)
        engine.load_model_state(HuggingFaceTensors(folder, shape))
        rate = RATES[optimizer.name]
        found[name] = [
            engine.train_step(_microbatches(step, mesh.data.rank, mesh.data.size), rate).loss for step in range(STEPS)
        ]
    return found


@cache
def losses_of_transformers(folder: Path, optimizer: OptimizerSection) -> list[float]:
    """A plain loop on one process."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": optimizer.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    rate = RATES[optimizer.name]
    if optimizer.name == "sgd":
        steps: torch.optim.Optimizer = torch.optim.SGD(groups, lr=rate, momentum=optimizer.momentum)
    else:
        steps = torch.optim.AdamW(groups, lr=rate, betas=optimizer.betas, eps=optimizer.eps)
    losses = []
    for step in range(STEPS):
        tokens = _tokens(step)
        loss = cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
        losses.append(loss.item())
        loss.backward()
        if optimizer.clip_grad_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer.clip_grad_norm)
        steps.step()
        steps.zero_grad()
    return losses


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each case."""
    root = tmp_path_factory.mktemp("models")
    return {name: _made(case, root / str(number)) for number, (name, case) in enumerate(CASES.items())}


def _made(case: FamilyCase, folder: Path) -> Path:
    made(case, folder)
    return folder


def check(folders: dict[str, Path], parallel: dict[str, Any], optimizer: OptimizerSection, ranks: int) -> None:
    by_rank = run_ranks(ranks, losses_here, ranks, parallel, folders, optimizer, timeout=280)
    for name, folder in folders.items():
        wanted = losses_of_transformers(folder, optimizer)
        assert wanted[-1] < wanted[3] - 0.1, "it learns"
        for losses in (rank[name] for rank in by_rank):
            assert losses == pytest.approx(wanted, rel=0, abs=TOLERANCE), name


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"pipeline": 2}], ids=str)
def test_T1_twenty_steps_are_those_of_transformers(parallel: dict[str, Any], folders: dict[str, Path]) -> None:
    check({name: folders[name] for name in ONE_OF_EACH}, parallel, ADAMW, 2)


@pytest.mark.soak
@pytest.mark.parametrize("optimizer", [ADAMW, SGD], ids=lambda section: section.name)
@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (2, {"tensor": 2, "sequence": True}),
        (2, {"pipeline": 2}),
        (2, {"data_shard": "full"}),
        (2, {"context": 2}),
        (4, {"tensor": 2, "pipeline": 2}),
    ],
    ids=str,
)
def test_T1_twenty_steps_of_every_variant(
    ranks: int, parallel: dict[str, Any], optimizer: OptimizerSection, folders: dict[str, Path]
) -> None:
    check(folders, parallel, optimizer, ranks)
