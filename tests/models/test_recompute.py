"""Recompute changes memory and nothing else: gradients are the same bits, alone, over ranks, and in split backward."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from models.tensor_cases import SHAPES, make_decoder, microbatch
from ranks import run_ranks
from torch import Tensor
from torch.autograd.profiler import profile
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from megatron.config.errors import ConfigError
from megatron.config.layout import Layout
from megatron.models import recompute
from megatron.models.decoder import Decoder
from megatron.models.initialise import initialise
from megatron.models.recompute import apply_recompute
from megatron.parallel.axis import ALONE, Axis
from megatron.parallel.mesh import close_mesh, launched, open_mesh
from megatron.parallel.model_place import ONE_PROCESS, ModelPlace

Way = tuple[str, str, int | None]
WAYS: list[Way] = [("selective", "attention", None), ("selective", "operations", None), ("full", "attention", None)]
WAYS += [("full", "attention", 1)]


def count_cores(model: Decoder) -> list[int]:
    """Each layer's calls of its attention core, to be looked at later. Before recompute is applied."""
    counts = [0] * len(model.layers)

    def counted(number: int, core: Any, *args: Any) -> Tensor:
        counts[number] += 1
        return core(*args)  # type: ignore[no-any-return]

    for number, layer in enumerate(model.layers.values()):
        layer.attention.core = partial(counted, number, layer.attention.core)
    return counts


def trained(
    way: Way, name: str, backend: str, place: ModelPlace = ONE_PROCESS
) -> tuple[dict[str, np.ndarray], list[int]]:
    """(loss, rows and gradients, calls of each layer's attention) of one microbatch."""
    model = make_decoder(SHAPES[name], backend, place)
    calls = count_cores(model)
    apply_recompute(model, *way)
    tokens, targets, documents = microbatch(3, SHAPES[name].vocab_size)
    total, rows = model(tokens, documents, targets, 0.25, torch.arange(70, 73))
    total.backward()
    results = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return results | {"total": total.detach().numpy(), "rows": rows.numpy()}, calls


def assert_same_bits(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


@pytest.mark.parametrize("backend", ["blockwise", "sdpa"])
@pytest.mark.parametrize("name", ["two key heads, tied", "neox", "dropout", "qwen3", "olmo2", "gpt2"])
def test_the_same_bits_alone(name: str, backend: str) -> None:
    want, calls = trained(("none", "attention", None), name, backend)
    assert calls == [1, 1]
    for way in WAYS:
        got, calls = trained(way, name, backend)
        assert_same_bits(got, want)
        assert calls == [2, 1 if way[2] == 1 else 2], way


def on_ranks(layout: Layout, sequence: bool, way: Way) -> tuple[Any, ...]:
    mesh = open_mesh(layout, launched(), 60)
    place = ModelPlace(tensor=mesh.tensor, sequence=sequence, context=mesh.context, context_method="gather")
    name = "dropout"
    results = *trained(("none", "attention", None), name, "blockwise", place), *trained(way, name, "blockwise", place)
    close_mesh()
    return results


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way)))
@pytest.mark.parametrize(
    "layout, sequence", [(Layout(tensor=2), False), (Layout(tensor=2), True), (Layout(context=2), False)]
)
def test_the_same_bits_on_ranks(layout: Layout, sequence: bool, way: Way) -> None:
    for want, once, got, calls in run_ranks(2, on_ranks, layout, sequence, way):
        assert_same_bits(got, want)
        assert once == [1, 1] and calls == [2, 1 if way[2] == 1 else 2]


def split_backward(way: Way, whole: bool = False, tensor: Axis = ALONE) -> tuple[dict[str, np.ndarray], list[int]]:
    """A middle stage, its backward pass in two parts as zero-bubble schedules run it; or whole."""
    place = ModelPlace(tensor=tensor, sequence=not tensor.alone, first=False, last=False, split_backward=True)
    model = make_decoder(SHAPES["neox"], "blockwise", place)
    calls = count_cores(model)
    apply_recompute(model, *way)
    x, upstream = torch.randn(
        2, 3, 24 // tensor.size, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    x.requires_grad_()
    out = model(x, microbatch(3, 100)[2])
    if whole:
        out.backward(upstream)
    else:
        _, groups = stage_backward_input([out], [upstream], [x], model.parameters())
        assert all(p.grad is None for p in model.parameters())
        stage_backward_weight(model.parameters(), groups)
    return {"x": x.grad.numpy()} | {name: p.grad.numpy() for name, p in model.named_parameters()}, calls


@pytest.mark.parametrize("way", [WAYS[0], WAYS[2], WAYS[3]], ids=lambda way: "-".join(map(str, way)))
def test_the_same_bits_where_input_and_weight_gradients_are_split(way: Way) -> None:
    want, _ = split_backward(("none", "attention", None), whole=True)
    got, calls = split_backward(way)
    assert_same_bits(got, want)
    assert calls == [2, 1 if way[2] == 1 else 2]


def split_on_ranks() -> list[tuple[dict[str, np.ndarray], list[int]]]:
    mesh = open_mesh(Layout(tensor=2), launched(), 60)
    results = [split_backward(WAYS[0], whole=True, tensor=mesh.tensor)]
    results += [split_backward(way, tensor=mesh.tensor) for way in (WAYS[0], WAYS[2], WAYS[3])]
    close_mesh()
    return results


def test_the_same_bits_where_they_are_split_over_tensor_ranks() -> None:
    for (want, _), *rest in run_ranks(2, split_on_ranks):
        for (got, calls), expected in zip(rest, ([2, 2], [2, 2], [2, 1]), strict=True):
            assert_same_bits(got, want)
            assert calls == expected


def test_why_torch_checkpoint_is_not_used_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should this fail at a newer torch, `_Once` may go."""
    monkeypatch.setattr(recompute, "_once", recompute._forgotten)
    _, calls = split_backward(WAYS[2])
    assert min(calls) > 5


def test_a_policy_that_split_schedules_cannot_run_is_refused() -> None:
    model = Decoder(SHAPES["neox"], place=ModelPlace(split_backward=True))
    with pytest.raises(ConfigError, match="recompute_policy = operations does not go with schedules that split"):
        apply_recompute(model, "selective", "operations")
    with pytest.raises(ValueError, match="'some'"):
        apply_recompute(model, "some")


def test_a_layer_that_is_not_deterministic_is_found() -> None:
    for split in (False, True):
        model = make_decoder(SHAPES["neox"], "blockwise", ModelPlace(split_backward=split))
        layer, seen = model.layers["0"], []

        def changing(forward: Any, x: Tensor, *args: Any, seen: list[int] = seen) -> Tensor:
            seen.append(0)
            return forward(x.sin() if len(seen) > 1 else x, *args)  # type: ignore[no-any-return]

        layer.mlp.forward = partial(changing, layer.mlp.forward)
        apply_recompute(model, "full")
        tokens, targets, documents = microbatch(2, 100)
        total, _ = model(tokens, documents, targets)
        with pytest.raises(RuntimeError, match="recompute|saved"):
            total.backward()


def test_names_and_copies_and_no_gradients() -> None:
    for way in WAYS:
        model = make_decoder(SHAPES["neox"], "blockwise", ONE_PROCESS)
        names = list(dict(model.named_parameters()))
        apply_recompute(model, *way)
        assert list(dict(model.named_parameters())) == names
        twin = copy.deepcopy(model)
        tokens, targets, documents = microbatch(2, 100)
        initialise(model, 99)  # the copy must not compute with the first one's weights
        totals = [m(tokens, documents, targets)[0] for m in (model, twin)]
        assert totals[0] != totals[1]
        totals[1].backward()
        assert all(p.grad is None for p in model.parameters())
        with torch.no_grad():
            assert not model(tokens, documents, targets)[0].requires_grad


def live_bytes(how: str, policy: str, split: bool = False) -> tuple[int, int]:
    """(what a forward pass of four layers leaves alive, the most alive in a backward pass)."""
    shape = copy.copy(SHAPES["two key heads, tied"])
    place = ModelPlace(layers=range(4), first=False, last=False, split_backward=split)
    model = Decoder(shape, place=place)
    initialise(model, 1)
    apply_recompute(model, how, policy)
    x, documents = torch.randn(4, 256, shape.hidden_size), torch.zeros(4, 256, dtype=torch.int32)
    x.requires_grad_()
    model(x, documents).sum().backward()
    with profile(profile_memory=True) as forward:
        out = model(x, documents).sum()
    with profile(profile_memory=True) as backward:
        out.backward()
    after = sum(memory(forward))
    return after, max(after + int(n) for n in np.cumsum(memory(backward)))


def memory(profiled: profile) -> list[int]:
    """Bytes taken (and given back, negative) one after the other."""
    events = [event for event in profiled.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def test_memory_falls() -> None:
    everything, peak = live_bytes("none", "attention")
    position = 4 * 256 * 4  # bytes of one channel in float32
    full, full_peak = live_bytes("full", "attention")
    assert full < 4 * 32 * position + everything / 20  # each layer's input, and what all layers share
    assert full_peak < 0.5 * peak
    once, once_peak = live_bytes("full", "attention", split=True)
    assert once < 1.05 * full and once_peak < 1.1 * full_peak
    attention, _ = live_bytes("selective", "attention")
    # probabilities of four heads: blocks of 128 see 128 and 256 keys
    probabilities = 4 * 4 * 4 * 4 * (128 * 128 + 128 * 256)
    assert attention <= everything - probabilities
    operations, _ = live_bytes("selective", "operations")
    assert full < operations < attention
