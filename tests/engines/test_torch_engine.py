"""The torch engine against a plain loop written here, and its promises: exact resume, no update that is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from engines.made_rows import Micro
from torch import Tensor

from megatron.checkpoint.tensor_shards import WholeTensors
from megatron.config.errors import CheckpointError, ConfigError
from megatron.config.model_shape import resolve_model
from megatron.config.schema import ModelSection, OptimizerSection, ParallelSection, TrainSection
from megatron.engines.base import Engine, StepResult
from megatron.engines.build import build_engine
from megatron.engines.row_losses import RowLosses
from megatron.engines.torch_engine import TorchStep
from megatron.kernels.choice import Kernels
from megatron.kernels.cross_entropy import IGNORED
from megatron.models.decoder import Decoder

SHAPE = resolve_model(ModelSection(preset="llama-tiny", seq_length=32), 100)
TRAIN = TrainSection(global_batch_size=4, micro_batch_size=2)
ADAMW = OptimizerSection(clip_grad_norm=0.7)
SGD = OptimizerSection(name="sgd", momentum=0.9, clip_grad_norm=0.0)


def engine(precision: str = "fp32", optimizer: OptimizerSection = ADAMW, seed: int = 5) -> Engine:
    return build_engine(SHAPE, optimizer, ParallelSection(), TRAIN, seed, precision)


def batch(seed: int, microbatches: int = 2) -> list[Micro]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(microbatches):
        tokens = torch.randint(0, 100, (2, 33), generator=generator)
        targets = tokens[:, 1:].clone()
        targets[torch.rand(targets.shape, generator=generator) < 0.2] = IGNORED
        ids = (torch.rand(2, 32, generator=generator) < 0.1).cumsum(1).int()
        sources = torch.randint(0, 3, (2,), generator=generator)
        made.append(Micro(tokens[:, :-1].clone(), targets, ids, sources, torch.arange(2)))
    return made


def copy_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Whole tensors, from the shards of a model on one process or as they are."""
    whole = {name: value if isinstance(value, Tensor) else value[0].tensor for name, value in state.items()}
    return {name: tensor.clone() for name, tensor in whole.items()}


def load(into: Engine, weights: dict[str, Tensor], moments: dict[str, Tensor] | None = None) -> None:
    into.load_model_state(WholeTensors(weights))
    if moments is not None:
        into.load_optimizer_state(WholeTensors(moments))


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


@pytest.mark.parametrize("optimizer", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_ten_steps_equal_a_plain_loop_in_float64(optimizer: OptimizerSection) -> None:
    ours = engine("fp64", optimizer)
    model = Decoder(SHAPE, Kernels(attention="sdpa")).double()
    model.load_state_dict(copy_of(ours.model_state()))
    decay = [p for p in model.parameters() if p.ndim > 1]
    groups = [{"params": decay}, {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}]
    if optimizer.name == "adamw":
        plain = torch.optim.AdamW(groups, betas=optimizer.betas, eps=optimizer.eps, weight_decay=optimizer.weight_decay)
    else:
        plain = torch.optim.SGD(groups, momentum=optimizer.momentum, weight_decay=optimizer.weight_decay)
    for step in range(10):
        microbatches, lr = batch(step), 1e-3 * (step + 1)
        result = ours.train_step(microbatches, lr)
        losses = torch.cat([model.loss(m.tokens, m.targets, m.document_ids) for m in microbatches])
        valid = sum(int((m.targets != IGNORED).sum()) for m in microbatches)
        loss = losses.sum() / valid
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        for parameter in model.parameters():
            parameter.grad *= min(1.0, (optimizer.clip_grad_norm or float("inf")) / float(norm))
        for group in plain.param_groups:
            group["lr"] = lr
        plain.step()
        plain.zero_grad()
        assert result.updated and result.valid_targets == valid
        assert result.loss == pytest.approx(float(loss.detach()), rel=1e-10)
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-10)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(copy_of(ours.model_state())[name], value, atol=1e-9, rtol=1e-9)


def test_loss_by_source_adds_up_and_is_each_sources_own() -> None:
    ours, microbatches = engine("fp64"), batch(3)
    alone: dict[int, float] = {}
    for micro in microbatches:
        for row, source in enumerate(micro.source_ids.tolist()):
            part = Micro(*(value[row : row + 1] for value in vars(micro).values()))
            alone[source] = alone.get(source, 0.0) + ours.evaluate([part])[source][0]
    result = ours.train_step(microbatches, 0.0)
    assert {s: total for s, (total, _) in result.loss_by_source.items()} == pytest.approx(alone, rel=1e-12)
    assert sum(count for _, count in result.loss_by_source.values()) == result.valid_targets
    sums = sum(total for total, _ in result.loss_by_source.values())
    assert sums == pytest.approx(result.loss * result.valid_targets)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_T2_resume_equals_the_undisturbed_run_bit_for_bit(precision: str, optimizer: OptimizerSection) -> None:
    def steps(of: Engine, numbers: range) -> list[StepResult]:
        return [of.train_step(batch(n), 1e-2) for n in numbers]

    whole = engine(precision, optimizer)
    undisturbed = steps(whole, range(10))
    first = engine(precision, optimizer)
    head = steps(first, range(5))
    weights, moments = copy_of(first.model_state()), copy_of(first.optimizer_state())
    steps(first, range(50, 53))
    second = engine(precision, optimizer, seed=77)
    load(second, weights, moments)
    assert_same(copy_of(second.optimizer_state()), moments)
    assert head + steps(second, range(5, 10)) == undisturbed
    assert_same(copy_of(whole.model_state()), copy_of(second.model_state()))
    assert_same(copy_of(whole.optimizer_state()), copy_of(second.optimizer_state()))


def test_bf16_masters_are_float32_and_follow_fp32() -> None:
    narrow, wide = engine("bf16"), engine("fp32")
    assert {value.dtype for value in copy_of(narrow.model_state()).values()} == {torch.float32}
    for step in range(10):
        ours, theirs = narrow.train_step(batch(step), 1e-3), wide.train_step(batch(step), 1e-3)
        assert ours.loss == pytest.approx(theirs.loss, rel=2e-3)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=3e-2)
    assert "bf16" in narrow.describe()["precision"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(precision: str, broken: float) -> None:
    ours = engine(precision)
    ours.train_step(batch(0), 1e-2)
    weights = copy_of(ours.model_state())
    bad = copy_of(weights)
    bad["layers.1.mlp.up.weight"][3, 3] = broken
    load(ours, bad)
    moments = copy_of(ours.optimizer_state())
    result = ours.train_step(batch(1), 1e-2)
    assert not result.updated and "not finite" in result.reason
    assert_same(copy_of(ours.optimizer_state()), moments)
    after = copy_of(ours.model_state())
    assert all(torch.equal(after[name], bad[name]) for name in bad if name != "layers.1.mlp.up.weight")
    load(ours, weights)
    repaired, untouched = ours.train_step(batch(2), 1e-2), engine(precision)
    untouched.train_step(batch(0), 1e-2)
    assert repaired == untouched.train_step(batch(2), 1e-2)


def test_a_batch_without_valid_targets_makes_no_update_and_says_so() -> None:
    ours, microbatches = engine(), batch(0)
    for micro in microbatches:
        micro.targets.fill_(IGNORED)
    weights = copy_of(ours.model_state())
    result = ours.train_step(microbatches, 1.0)
    assert not result.updated and result.valid_targets == 0 and result.loss == 0.0 and "no target" in result.reason
    assert_same(copy_of(ours.model_state()), weights)


def test_evaluate_changes_no_state() -> None:
    ours = engine("bf16")
    ours.train_step(batch(0), 1e-2)
    before = [copy_of(state) for state in (ours.model_state(), ours.optimizer_state(), ours.rng_state())]
    first = ours.evaluate(batch(9))
    assert first == ours.evaluate(batch(9))
    for state, now in zip(before, (ours.model_state(), ours.optimizer_state(), ours.rng_state()), strict=True):
        assert_same(state, copy_of(now))


def test_reset_optimizer_starts_as_a_fresh_one_does() -> None:
    ours, fresh = engine(), engine()
    ours.train_step(batch(0), 1e-2)
    weights = copy_of(ours.model_state())
    ours.reset_optimizer()
    assert ours.optimizer_state() == {}
    load(fresh, weights)
    assert ours.train_step(batch(1), 1e-2) == fresh.train_step(batch(1), 1e-2)
    assert_same(copy_of(ours.optimizer_state()), copy_of(fresh.optimizer_state()))


def test_random_state_round_trip() -> None:
    ours = engine()
    state = copy_of(ours.rng_state())
    first = torch.rand(3)
    ours.load_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_states_that_do_not_fit_are_refused_by_name_and_change_nothing() -> None:
    ours = engine()
    ours.train_step(batch(0), 1e-2)
    weights, moments = copy_of(ours.model_state()), copy_of(ours.optimizer_state())
    name = "layers.0.attention.query.weight"
    for broken, words in (
        ({k: v for k, v in weights.items() if k != name}, name),
        ({**weights, "layers.9.extra": torch.ones(1)}, "layers.9.extra"),
        ({**weights, name: weights[name][1:]}, name),
        ({**weights, name: weights[name].double()}, "float64"),
    ):
        with pytest.raises(CheckpointError, match=words):
            ours.load_model_state(WholeTensors(broken))
    for broken, words in (
        ({k: v for k, v in moments.items() if k != f"{name}/step"}, f"{name}/step"),
        ({**moments, f"{name}/momentum_buffer": weights[name]}, "momentum_buffer"),
        ({**moments, f"{name}/exp_avg": weights[name].bfloat16()}, "bfloat16"),
    ):
        with pytest.raises(CheckpointError, match=words):
            ours.load_optimizer_state(WholeTensors(broken))
    assert_same(copy_of(ours.model_state()), weights)
    assert_same(copy_of(ours.optimizer_state()), moments)


def test_a_parameter_without_a_gradient_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = engine()
    layer = ours._weights.modules[0].layers["1"]  # type: ignore[attr-defined]
    monkeypatch.setattr(layer.mlp.down, "forward", lambda x: torch.zeros(*x.shape[:-1], SHAPE.hidden_size))
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.down\.weight"):
        ours.train_step(batch(0), 1e-2)


@pytest.mark.parametrize("key", ["tensor", "pipeline", "context"])
def test_a_layout_of_more_ranks_than_there_are_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="1 processes are not a multiple"):
        build_engine(SHAPE, ADAMW, ParallelSection(**{key: 2}), TRAIN, 0, "fp32")  # type: ignore[arg-type]


@pytest.mark.parametrize("clip", [0.0, 1e-1, 1e3])
def test_a_step_that_waits_for_no_numbers_equals_one_that_does(clip: float) -> None:
    """What GPUs do: clipping and the choice not to update are tensors, and nothing is asked of the device."""
    # eps: AdamW makes as much of a gradient that is rounding noise as of any other
    waiting, launched = (engine("fp32", OptimizerSection(clip_grad_norm=clip, eps=1e-3)) for _ in range(2))
    launched._stays_on_device = True  # type: ignore[attr-defined]
    for number in range(3):
        wanted, step = waiting.train_step(batch(number), 1e-2), launched.launch_step(batch(number), 1e-2)
        assert not step.ready and step.result().updated
        assert step.result().loss == pytest.approx(wanted.loss, rel=1e-4)
        assert step.result().grad_norm == pytest.approx(wanted.grad_norm, rel=1e-3)
    torch.testing.assert_close(copy_of(launched.model_state()), copy_of(waiting.model_state()), atol=1e-6, rtol=1e-5)


def test_a_steps_numbers_are_those_of_when_it_was_launched() -> None:
    table = torch.tensor([[2.0, 4.0, 3.0], [1.0, 1.0, 2.0], [7.0, 3.0, 7.0]], dtype=torch.float64)
    norm = torch.tensor(5.0, dtype=torch.float64)
    step = TorchStep(RowLosses(table), norm, 4, ready=False)
    table.fill_(math.nan)
    norm.fill_(math.nan)
    assert step.result() is step.result()
    assert step.result() == StepResult(9 / 4, {3: (4.0, 1), 7: (5.0, 3)}, 5.0, 4, True)


def test_a_launched_step_that_is_not_finite_changes_nothing() -> None:
    ours = engine("fp32")
    ours._stays_on_device = True  # type: ignore[attr-defined]
    ours.train_step(batch(0), 1e-2)
    weights, state = copy_of(ours.model_state()), copy_of(ours.optimizer_state())
    with torch.no_grad():
        next(iter(ours._weights.held)).local[0, 0] = math.nan  # type: ignore[attr-defined]
    result = ours.train_step(batch(1), 1e-2)
    assert not result.updated and "not finite" in result.reason
    with torch.no_grad():
        next(iter(ours._weights.held)).local[0, 0] = weights["embedding.weight"][0, 0]  # type: ignore[attr-defined]
    for name, value in copy_of(ours.model_state()).items():
        assert torch.equal(value, weights[name]), name
    for name, value in copy_of(ours.optimizer_state()).items():
        assert torch.equal(value, state[name]), name


def test_gradients_added_up_in_bf16_train_alike() -> None:
    narrow = build_engine(SHAPE, ADAMW, ParallelSection(), TRAIN.model_copy(update={"gradients": "bf16"}), 5, "bf16")
    wide = engine("bf16")
    assert narrow.describe()["precision"] == "bf16, fp32 master weights, bf16 gradients"
    for number in range(8):
        ours, theirs = (side.train_step(batch(number), 1e-3) for side in (narrow, wide))
        assert ours.loss == pytest.approx(theirs.loss, rel=2e-3)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=2e-2)


def test_a_step_in_fp8_is_near_that_in_bf16() -> None:
    kernels = Kernels(fp8=True)
    narrow = build_engine(SHAPE, ADAMW, ParallelSection(), TRAIN, 5, "bf16", kernels=kernels)
    wide = engine("bf16")
    for number in range(3):
        ours, theirs = (side.train_step(batch(number), 1e-3) for side in (narrow, wide))
        assert ours.updated and ours.loss == pytest.approx(theirs.loss, rel=2e-2)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=0.15)
        assert ours.loss != theirs.loss, "8 bits are not 16"


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.soak), "bf16"])
def test_compiled_layers_train_alike(precision: str) -> None:
    kernels = Kernels(norm="compile", rope="compile", activation="compile", attention="sdpa", compile_layers=True)
    compiled = build_engine(SHAPE, ADAMW, ParallelSection(), TRAIN, 5, precision, kernels=kernels)
    assert compiled.describe()["kernels"].endswith("layers compiled")
    plain, tolerance = engine(precision), {"fp32": 1e-5, "bf16": 1e-2}[precision]
    for number in range(3):
        ours, theirs = (side.train_step(batch(number), 1e-3) for side in (compiled, plain))
        assert ours.loss == pytest.approx(theirs.loss, rel=tolerance)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=10 * tolerance)


def test_z_loss_and_smoothing_are_minimised_and_not_reported() -> None:
    train = TRAIN.model_copy(update={"z_loss": 1e-2, "label_smoothing": 0.1})
    ours, plain = build_engine(SHAPE, SGD, ParallelSection(), train, 5, "fp64"), engine("fp64", SGD)
    first, other = ours.train_step(batch(0), 0.1), plain.train_step(batch(0), 0.1)
    assert first.loss == other.loss, "what is reported is cross-entropy"
    assert first.grad_norm != pytest.approx(other.grad_norm, rel=1e-3)

    model = Decoder(SHAPE, Kernels(attention="sdpa")).double()
    load_initial(model)
    valid = sum(int((m.targets != IGNORED).sum()) for m in batch(0))
    total = torch.zeros((), dtype=torch.float64)
    for m in batch(0):
        logits, counted = model.logits(m.tokens, m.document_ids), (m.targets != IGNORED).flatten()
        flat = logits.flatten(0, 1)[counted]
        total = total + torch.nn.functional.cross_entropy(
            flat, m.targets.flatten()[counted], reduction="sum", label_smoothing=0.1
        )
        total = total + 1e-2 * flat.logsumexp(-1).square().sum()
    (total / valid).backward()
    norm = torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt()
    assert first.grad_norm == pytest.approx(float(norm), rel=1e-9)


def load_initial(model: Decoder) -> None:
    """The weights that an engine of this seed begins with."""
    model.load_state_dict(copy_of(engine("fp64", SGD).model_state()))
