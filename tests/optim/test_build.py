"""Optimizers over local tensors: shards step as their whole tensors do, and state comes and goes by global name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Muon

from megatron.config.errors import CheckpointError, ConfigError
from megatron.config.schema import OptimizerSection
from megatron.optim.build import (
    build_optimizer,
    check_state_names,
    describe_optimizer,
    flatten_state,
    load_state,
    state_keys,
)

SHAPES = {
    "embedding.weight": (9, 4),
    "layers.0.attention_norm.weight": (4,),
    "layers.0.attention.query.weight": (4, 4),
    "layers.0.attention.query.bias": (4,),
    "layers.0.mlp.up.weight": (8, 4),
    "final_norm.weight": (4,),
    "head.weight": (9, 4),
}
ADAMW = OptimizerSection(weight_decay=0.3)
MOMENTUM = OptimizerSection(name="sgd", momentum=0.9)
PLAIN = OptimizerSection(name="sgd")
MUON = OptimizerSection(name="muon", weight_decay=0.3)
ALL = pytest.mark.parametrize("section", [ADAMW, MOMENTUM, PLAIN, MUON], ids=["adamw", "momentum", "sgd", "muon"])
ELEMENTWISE = pytest.mark.parametrize("section", [ADAMW, MOMENTUM, PLAIN], ids=["adamw", "momentum", "sgd"])


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in SHAPES.items()}


def train(section: OptimizerSection, parameters: dict[str, Tensor], steps: range, optimizer=None, cut=None):  # type: ignore[no-untyped-def]
    """Steps with gradients drawn by step number; cut: from a whole tensor to this rank's part of it."""
    optimizer = optimizer or build_optimizer(parameters, section)
    for step in steps:
        for name, gradient in tensors(100 + step, next(iter(parameters.values())).dtype).items():
            parameters[name].grad = cut(name, gradient) if cut else gradient
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (step + 1)
        optimizer.step()
    return optimizer


def by_hand(section: OptimizerSection, parameters: dict[str, Tensor]) -> list[torch.optim.Optimizer]:
    """The same by torch's own classes, with groups written out."""
    vectors = [p for name, p in parameters.items() if "norm" in name or name.endswith("bias")]
    inner = [
        p for name, p in parameters.items() if name in ("layers.0.attention.query.weight", "layers.0.mlp.up.weight")
    ]
    outer = [parameters["embedding.weight"], parameters["head.weight"]]
    decayed = outer if section.name == "muon" else outer + inner
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    if section.name == "sgd":
        for group in groups:
            group["weight_decay"] = group["weight_decay"] and section.weight_decay
        return [SGD(groups, lr=0.0, momentum=section.momentum)]
    made: list[torch.optim.Optimizer] = [AdamW(groups, lr=0.0, betas=(0.9, 0.95), foreach=False)]
    if section.name == "muon":
        made.append(Muon(inner, lr=0.0, weight_decay=0.3, momentum=0.95, adjust_lr_fn="match_rms_adamw"))
    return made


@ALL
def test_steps_are_those_of_torchs_classes(section: OptimizerSection) -> None:
    ours, theirs = tensors(0), tensors(0)
    train(section, ours, range(4))
    for optimizer in by_hand(section, theirs):
        train(section, theirs, range(4), optimizer)
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], msg=name)
        assert not torch.equal(ours[name], tensors(0)[name])


@ELEMENTWISE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_shards_step_as_the_whole_even_where_some_are_empty(section: OptimizerSection, dtype: torch.dtype) -> None:
    whole = tensors(0, dtype)
    optimizer = train(section, whole, range(3))
    state = flatten_state(optimizer, whole)
    # where the kernel's wide lanes end decides the rounding of some products
    close = {"rtol": 1e-6, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 1e-14, "atol": 1e-15}
    ranks = 6  # more than the 4 rows that most tensors have, so that the last ranks hold nothing of them
    for rank in range(ranks):

        def part(name: str, tensor: Tensor, rank: int = rank) -> Tensor:
            height = -(-tensor.shape[0] // ranks)
            return tensor[rank * height : (rank + 1) * height].clone()

        mine = {name: part(name, tensor) for name, tensor in tensors(0, dtype).items()}
        assert rank < 4 or not mine["final_norm.weight"].numel()
        shards = flatten_state(train(section, mine, range(3), cut=part), mine)
        assert shards.keys() == state.keys()
        for name in SHAPES:
            torch.testing.assert_close(mine[name], part(name, whole[name]), **close)
        for place, shard in shards.items():
            expected = state[place] if place.endswith("/step") else part(place, state[place])
            torch.testing.assert_close(shard, expected, **close)


@ALL
def test_state_has_the_names_that_are_promised_and_resumes_bit_for_bit(section: OptimizerSection) -> None:
    there, here = tensors(0), tensors(0)
    optimizer = train(section, there, range(3))
    flat = flatten_state(optimizer, there)
    promised = {f"{n}/{key}" for n, shape in SHAPES.items() for key in state_keys(section, n, len(shape))}
    assert flat.keys() == promised
    assert all(flat[p].shape == ((),) or flat[p].dtype == torch.float32 for p in flat if p.endswith("/step"))
    saved = {place: value.clone() for place, value in flat.items()}
    here = {name: value.clone() for name, value in there.items()}
    train(section, there, range(3, 5), optimizer)
    resumed = build_optimizer(here, section)
    load_state(resumed, here, section, saved)
    train(section, here, range(3, 5), resumed)
    assert all(torch.equal(there[name], here[name]) for name in SHAPES)
    load_state(resumed, here, section, {})
    assert flatten_state(resumed, here) == {}
    anew = {name: value.clone() for name, value in here.items()}
    train(section, here, range(5, 6), resumed)
    train(section, anew, range(5, 6))
    assert all(torch.equal(anew[name], here[name]) for name in SHAPES)


def test_muon_takes_the_matrices_of_layers_and_nothing_else() -> None:
    taken = {name for name, shape in SHAPES.items() if state_keys(MUON, name, len(shape)) == ("momentum_buffer",)}
    assert taken == {"layers.0.attention.query.weight", "layers.0.mlp.up.weight"}
    # a pipeline stage may hold layers alone, or none
    for names in (taken, SHAPES.keys() - taken):
        parameters = {name: tensor for name, tensor in tensors(0).items() if name in names}
        optimizer = build_optimizer(parameters, MUON)
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert {place.split("/")[0] for place in flatten_state(optimizer, parameters)} == names


def test_muon_moves_a_weight_about_as_far_as_adamw_does() -> None:
    generator = torch.Generator().manual_seed(3)
    name, moved = "layers.0.mlp.up.weight", {}
    for section in (OptimizerSection(name="muon", weight_decay=0), OptimizerSection(weight_decay=0)):
        parameter = torch.zeros(128, 48)
        optimizer = build_optimizer({name: parameter}, section)
        for group in optimizer.param_groups:
            group["lr"] = 1.0
        parameter.grad = torch.randn(128, 48, generator=generator)
        optimizer.step()
        moved[section.name] = float(parameter.square().mean().sqrt())
    # Moonshot's scale is for AdamW in mid-training, whose update is 0.2 to 0.4 of its first step's
    assert 0.1 < moved["muon"] / moved["adamw"] < 0.4


def test_muon_refuses_cut_matrices() -> None:
    with pytest.raises(ConfigError, match=r'"muon" needs whole matrices, and layers.0.mlp.up.weight is cut.*"adamw"'):
        build_optimizer(tensors(0), MUON, cut={"layers.0.mlp.up.weight"})
    with pytest.raises(ConfigError, match="layers.0.attention.query.weight is cut"):
        build_optimizer({"layers.0.attention.query.weight": torch.empty(0, 4)}, MUON)
    build_optimizer(tensors(0), MUON, cut={"embedding.weight"})


def test_names_that_do_not_fit_are_said() -> None:
    parameters = tensors(0)
    flat = flatten_state(train(ADAMW, parameters, range(1)), parameters)
    check_state_names(flat, parameters, ADAMW)
    check_state_names([], parameters, ADAMW)
    with pytest.raises(CheckpointError, match=r"unknown embedding.weight/exp_avg, .* and 18 more: another optimizer"):
        check_state_names(flat, parameters, PLAIN)
    with pytest.raises(CheckpointError, match="lacks layers.0.attention.query.weight/momentum_buffer, "):
        check_state_names(flat, parameters, MUON)
    optimizer = build_optimizer(parameters, ADAMW)
    for place, wrong in (("head.weight/exp_avg", torch.zeros(4, 9)), ("head.weight/step", torch.zeros(1))):
        with pytest.raises(CheckpointError, match=rf"{place} is torch.float32 .* the model needs"):
            load_state(optimizer, parameters, ADAMW, flat | {place: wrong})
    assert not optimizer.state


def test_what_runs_is_said() -> None:
    assert [describe_optimizer(section) for section in (ADAMW, PLAIN, MOMENTUM, MUON)] == [
        "AdamW, torch's fused kernel",
        "SGD",
        "SGD, momentum 0.9",
        "torch's Muon for the matrices of layers, AdamW (torch's fused kernel) for the rest",
    ]
