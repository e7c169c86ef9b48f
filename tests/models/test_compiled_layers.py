"""Layers compiled in place: how many programs a run compiles, and that names stay."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
import torch._dynamo
from models.tensor_cases import SHAPES
from ranks import run_ranks

from megatron.config.layout import Layout
from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.schema import ModelSection
from megatron.kernels.choice import Kernels
from megatron.models import compiled_layers
from megatron.models.compiled_layers import compile_layers
from megatron.models.decoder import Decoder
from megatron.models.initialise import initialise
from megatron.models.joined import join
from megatron.models.recompute import apply_recompute
from megatron.parallel.mesh import close_mesh, launched, open_mesh
from megatron.parallel.model_place import ModelPlace

SHAPE = resolve_model(ModelSection(preset="llama-tiny", num_hidden_layers=12, seq_length=32), 64)
KERNELS = Kernels(attention="sdpa", norm="compile", rope="compile", activation="compile", compile_layers=True)


@pytest.fixture(autouse=True)
def captured_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are captured and differentiated as ever, and run by torch's own operations, in no time."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(compiled_layers, "compiler", partial(torch.compile, backend="aot_eager"))


def steps(model: Decoder, lengths: tuple[int, ...]) -> list[torch.Tensor]:
    """The loss at each length, and then every gradient, added up."""
    totals = []
    for length in lengths:
        drawn = torch.Generator().manual_seed(length)
        tokens = torch.randint(0, 64, (2, length), generator=drawn)
        ids = (torch.rand(2, length, generator=drawn) < 0.1).cumsum(1).int()
        total = model(tokens, ids, tokens, 1 / tokens.numel())[0]
        total.sum().backward()
        totals.append(total.detach())
    return [*totals, *(p.grad for p in model.parameters() if p.grad is not None)]


def made(kernels: Kernels, joined: bool = False, recompute: str = "none", shape: ModelShape = SHAPE) -> Decoder:
    model = Decoder(shape, kernels)
    initialise(model, 0)
    if joined:
        join(model)
    if kernels.compile_layers:
        compile_layers(model)
    apply_recompute(model, recompute)
    return model


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_one_program_serves_all_layers_and_one_more_all_lengths(joined: bool, recompute: str) -> None:
    lengths = (16, 24, 32, 20, 28)
    plain, compiled = made(Kernels(attention="sdpa")), made(KERNELS, joined, recompute)
    assert [name for name, _ in compiled.named_parameters()] == [name for name, _ in plain.named_parameters()]
    wanted = steps(plain, lengths)
    for got, want in zip(steps(compiled, lengths), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    counters = torch._dynamo.utils.counters
    frames, breaks = counters["frames"], counters["graph_break"]
    assert frames["ok"] == frames["total"] <= 6, f"layer, last norm and the rotary table, at most twice each: {frames}"
    assert not breaks, f"nothing of a layer runs outside its program: {dict(breaks)}"


@pytest.mark.parametrize("backends", list(product(("eager", "compile"), repeat=3)), ids=" ".join)
@pytest.mark.parametrize("attention", ["sdpa", "blockwise"])
def test_gradients_whatever_is_compiled(backends: tuple[str, str, str], attention: str) -> None:
    """Of joined projections: what is turned in place outside a program must not be turned in place inside one."""
    names = dict(zip(("norm", "rope", "activation"), backends, strict=True))
    few = replace(SHAPE, num_hidden_layers=2)
    kernels = Kernels(attention=attention, compile_layers=True, **names)  # type: ignore[arg-type]
    wanted = steps(made(Kernels(attention="sdpa"), shape=few), (16,))
    for got, want in zip(steps(made(kernels, joined=True, shape=few), (16,)), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    if attention == "sdpa":
        breaks = torch._dynamo.utils.counters["graph_break"]
        assert not breaks, dict(breaks)


@pytest.mark.parametrize("family", ["qwen3", "olmo2", "gpt2", "both norms, offset, multipliers"])
def test_one_program_serves_all_layers_of_each_family(family: str) -> None:
    shape = replace(SHAPES[family], num_hidden_layers=3, hidden_dropout=0.0)
    wanted = steps(made(Kernels(attention="sdpa"), shape=shape), (16, 24))
    for got, want in zip(steps(made(KERNELS, joined=True, shape=shape), (16, 24)), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    counters = torch._dynamo.utils.counters
    frames, breaks = counters["frames"], counters["graph_break"]
    assert frames["ok"] == frames["total"] <= 6 and not breaks, f"{frames}, {dict(breaks)}"


def on_tensor_ranks(sequence: bool) -> list[list[torch.Tensor]]:
    compiled_layers.compiler = partial(torch.compile, backend="aot_eager")
    mesh = open_mesh(Layout(tensor=2), launched(), 60)
    found = []
    for family in ("qwen3", "olmo2"):
        for kernels in (Kernels(attention="sdpa"), KERNELS):
            model = Decoder(SHAPES[family], kernels, ModelPlace(tensor=mesh.tensor, sequence=sequence))
            initialise(model, 0)
            if kernels.compile_layers:
                compile_layers(model)
            found.append([part.detach() for part in steps(model, (16, 24))])
    close_mesh()
    return found


@pytest.mark.soak
@pytest.mark.parametrize("sequence", [False, True])
def test_norms_of_queries_and_keys_over_tensor_ranks_in_programs(sequence: bool) -> None:
    for plain, compiled, plain_width, compiled_width in run_ranks(2, on_tensor_ranks, sequence):
        for wanted, found in ((plain, compiled), (plain_width, compiled_width)):
            for got, want in zip(found, wanted, strict=True):
                torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_attention_that_the_host_cuts_runs_between_two_programs() -> None:
    kernels = Kernels(attention="blockwise", norm="compile", rope="compile", activation="compile", compile_layers=True)
    compiled = made(kernels)
    steps(compiled, (16, 24, 32))
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert breaks and all("torch.compiler.disable" in reason for reason in breaks), dict(breaks)
