"""Mappings of the tensor axis against what they mean on whole tensors, and what they send and keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from torch.nn import functional

from megatron.config.layout import Layout
from megatron.parallel.axis import ALONE, Axis
from megatron.parallel.mesh import close_mesh, launched, open_mesh
from megatron.parallel.tensor_mappings import (
    enter,
    gather_from_sequence,
    gathered_linears,
    leave,
    scatter_to_sequence,
)

RANKS = 4
BATCHES = (1, 3)


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def own(whole: Tensor, axis: Axis, dim: int) -> Tensor:
    return whole.chunk(axis.size, dim)[axis.rank].contiguous()


def two_layers(axis: Axis, batch: int, sequence: bool, fused: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """x -> (gate, up) cut by outputs -> product -> down cut by inputs; output and gradients, of this rank."""
    x = drawn(batch, 8, 6, seed=1, dtype=dtype)
    x = (own(x, axis, 1) if sequence else x).requires_grad_()
    weights = [own(drawn(12, 6, seed=seed, dtype=dtype), axis, 0).requires_grad_() for seed in (2, 3)]
    bias = own(drawn(12, seed=4, dtype=dtype), axis, 0).requires_grad_()
    down = own(drawn(6, 12, seed=5, dtype=dtype), axis, 1).requires_grad_()
    if fused:
        gate, up = gathered_linears(x, weights, (bias, None), axis, sequence)
    else:
        whole = enter(x, axis, sequence)
        gate, up = functional.linear(whole, weights[0], bias), functional.linear(whole, weights[1])
    y = leave(functional.linear(gate * up, down), axis, sequence)
    upstream = drawn(batch, 8, 6, seed=6, dtype=dtype)
    y.backward(own(upstream, axis, 1) if sequence else upstream)
    found = {"y": y.detach(), "x": x.grad, "gate": weights[0].grad, "up": weights[1].grad, "bias": bias.grad}
    return found | {"down": down.grad}


def two_layers_on_ranks() -> dict[tuple[Any, ...], dict[str, Any]]:
    mesh = open_mesh(Layout(tensor=RANKS), launched(), 60)
    found = {}
    for batch in BATCHES:
        for sequence in (False, True):
            for fused in (False, True):
                for dtype in (torch.float64, torch.bfloat16):
                    result = two_layers(mesh.tensor, batch, sequence, fused, dtype)
                    key = batch, sequence, fused, str(dtype)
                    found[key] = {name: value.double().numpy() for name, value in result.items()}
    close_mesh()
    return found


def test_two_layers_equal_one_process() -> None:
    ranks = run_ranks(RANKS, two_layers_on_ranks)
    for key in ranks[0]:
        batch, sequence, _, dtype = key
        whole = two_layers(ALONE, batch, sequence, False, torch.float64)
        for name, expected in whole.items():
            parts = [torch.from_numpy(rank[key][name]) for rank in ranks]
            if name in ("y", "x"):
                found = torch.cat(parts, 1) if sequence else parts[0]
                assert sequence or all(torch.equal(part, found) for part in parts)
            else:
                found = torch.cat(parts, 1 if name == "down" else 0)
            tolerance = 1e-13 if dtype == "torch.float64" else 0.03
            size = float(expected.abs().max())
            torch.testing.assert_close(found, expected, atol=tolerance * size, rtol=tolerance, msg=f"{key} {name}")


def scattered_and_gathered() -> list[tuple[Any, Any]]:
    mesh = open_mesh(Layout(tensor=RANKS), launched(), 60)
    pairs = []
    for batch in BATCHES:
        x = drawn(batch, 8, 2, seed=7).requires_grad_()
        part = scatter_to_sequence(x, mesh.tensor)
        assert torch.equal(part, own(x, mesh.tensor, 1))
        whole = gather_from_sequence(part * 2, mesh.tensor)
        upstream = drawn(batch, 8, 2, seed=8)
        whole.backward(upstream)
        pairs += [(whole.detach().numpy(), (2 * x).detach().numpy()), (x.grad.numpy(), (2 * upstream).numpy())]
    with pytest.raises(ValueError, match="7 positions cannot be cut over 4 tensor ranks"):
        scatter_to_sequence(torch.zeros(1, 7, 2), mesh.tensor)
    with pytest.raises(ValueError, match="7 positions"):
        leave(torch.zeros(1, 7, 2), mesh.tensor, True)
    close_mesh()
    return pairs


def test_scattered_and_gathered_again() -> None:
    for pairs in run_ranks(RANKS, scattered_and_gathered):
        for found, expected in pairs:
            assert (found == expected).all()


@pytest.mark.parametrize("mapping", [enter, leave])
def test_alone_nothing_happens(mapping: Callable[[Tensor, Axis, bool], Tensor]) -> None:
    x = torch.zeros(1, 3, 2)
    assert mapping(x, ALONE, True) is x
    assert scatter_to_sequence(x, ALONE) is x and gather_from_sequence(x, ALONE) is x


def kept_for_backward() -> list[tuple[int, ...]]:
    mesh = open_mesh(Layout(tensor=2), launched(), 60)
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    x, weights = torch.zeros(2, 4, 6, requires_grad=True), [torch.zeros(3, 6, requires_grad=True) for _ in range(2)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gathered_linears(x, weights, (None, None), mesh.tensor, True)
    close_mesh()
    return kept


def test_only_the_own_part_of_the_sequence_is_kept() -> None:
    for kept in run_ranks(2, kept_for_backward):
        assert sorted(kept) == [(2, 4, 6), (3, 6), (3, 6)]
