"""Attention over packed documents and FlexAttention against the definition: plans, packing, grouped heads, gradients.

On CPUs the packed operations are stand-ins (`packed_stand_ins.py`) in float64, and FlexAttention runs uncompiled. Tests
marked gpu run the real ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.packed_stand_ins import stand_ins
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from megatron.config.errors import UnavailableError
from megatron.kernels import attention_flex, attention_varlen
from megatron.kernels.attention import attention_sdpa, piece_starts, plan_for_sdpa, plan_pieces
from megatron.kernels.attention_choice import AttentionCall, attention_call, attention_candidates, attention_obstacle
from megatron.kernels.attention_flex import FlexPlan, block_mask, plan_flex
from megatron.kernels.attention_varlen import VarlenPlan, plan_cudnn, plan_varlen
from megatron.kernels.document_lengths import DocumentBounds, document_bounds
from megatron.parallel.axis import ALONE
from megatron.parallel.context_attention import ContextPlan, context_attention, plan_context

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch sees none")


@pytest.fixture(scope="module", autouse=True)
def packed_operations() -> Iterator[None]:
    with stand_ins():
        yield


@pytest.fixture
def flex_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention refuses gradients on CPUs, though its uncompiled form has them."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    torch_flex._WARNINGS_SHOWN.add("flex_attention_performance")


def random_inputs(shape: tuple[int, ...], seed: int = 0, **made: object) -> list[Tensor]:
    """In the memory order of projections, [batch, T, groups, heads, d]."""
    batch, groups, length, heads, size = shape
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for n in (heads, 1, 1):
        x = torch.randn(batch, length, groups, n, size, generator=generator, dtype=torch.float64).to(**made)
        inputs.append(x.transpose(1, 2).requires_grad_())
    return inputs


def assert_same(ours: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Outputs and gradients."""
    torch.testing.assert_close(ours, expected, atol=1e-11, rtol=1e-9)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.autograd.grad(expected, inputs, upstream, retain_graph=True)
    for got, want in zip(torch.autograd.grad(ours, inputs, upstream), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-9)


shapes = st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 9), st.integers(1, 3), st.sampled_from([1, 4]))


def drawn_ids(data: st.DataObject, batch: int, length: int) -> Tensor:
    steps = st.lists(st.integers(0, 1), min_size=length, max_size=length)
    return torch.tensor([data.draw(steps) for _ in range(batch)]).cumsum(1).int()


@settings(max_examples=40, deadline=None)
@given(shapes, st.booleans(), st.data())
def test_packed_documents_equal_the_definition(shape: tuple[int, ...], told: bool, data: st.DataObject) -> None:
    ids = drawn_ids(data, shape[0], shape[2])
    inputs, first = random_inputs(shape), piece_starts(ids)
    bounds = document_bounds(ids) if told else None
    expected = attention_sdpa(*inputs, plan_for_sdpa(first))
    assert_same(attention_varlen.attention_varlen(*inputs, plan_varlen(first, bounds)), expected, inputs)
    plan = plan_cudnn(first, bounds)
    if plan.pieces:
        assert_same(attention_varlen.attention_cudnn(*inputs, plan), expected, inputs)


@settings(max_examples=40, deadline=None)
@given(shapes, st.data())
def test_queries_of_some_positions_equal_those_of_all(shape: tuple[int, ...], data: st.DataObject) -> None:
    ids = drawn_ids(data, shape[0], shape[2])
    positions = torch.tensor(sorted(data.draw(st.sets(st.integers(0, shape[2] - 1), min_size=1))))
    inputs, first = random_inputs(shape), piece_starts(ids)
    expected = attention_sdpa(*inputs, plan_for_sdpa(first))[:, positions]
    plan = plan_varlen(first, document_bounds(ids), positions)
    here = inputs[0][:, :, positions]
    assert_same(attention_varlen.attention_varlen(here, *inputs[1:], plan), expected, inputs)


@pytest.mark.parametrize("documents", [1, 3])
def test_flex_equals_the_definition(documents: int, flex_gradients: None) -> None:
    ids = (torch.arange(300) * documents // 300).expand(2, 300).clone()
    ids[1, 40:] += 1
    inputs, first = random_inputs((2, 2, 300, 3, 8)), piece_starts(ids)
    expected = attention_sdpa(*inputs, plan_for_sdpa(first))
    assert_same(attention_flex.attention_flex(*inputs, plan_flex(first)), expected, inputs)
    positions = torch.cat((torch.arange(30, 105), torch.arange(200, 275)))
    plan = plan_flex(first, positions=positions)
    ours = attention_flex.attention_flex(inputs[0][:, :, positions], *inputs[1:], plan)
    assert_same(ours, expected[:, positions], inputs)


@pytest.mark.parametrize("length", [1, 128, 300, 640])
@pytest.mark.parametrize("density", [0.0, 0.004, 0.05, 0.6])
def test_blocks_are_those_that_torch_finds_from_every_pair(length: int, density: float) -> None:
    generator = torch.Generator().manual_seed(length)
    first = piece_starts((torch.rand(3, length, generator=generator) < density).cumsum(1))
    for begin in {0, length // 3, length // 2}:
        end = length - (length - begin) // 4
        ours = block_mask(first, begin, end)
        theirs = torch_flex.create_block_mask(ours.mask_mod, 3, None, end - begin, length, device="cpu")
        assert torch.equal(ours.to_dense(), theirs.to_dense())
        whole, whole_theirs = (
            torch_flex._ordered_to_dense(m.full_kv_num_blocks, m.full_kv_indices, m.full_kv_indices.shape[-1])
            for m in (ours, theirs)
        )
        # torch counts queries behind the end as seeing nothing, and so calls no block of the last row whole
        rows = (end - begin) // attention_flex.BLOCK
        assert torch.equal(whole[:, :, :rows], whole_theirs[:, :, :rows])


@pytest.mark.parametrize(("backend", "programs"), [("flex", 1), ("varlen", 2)])
def test_inside_a_compiled_layer_other_documents_need_no_other_program(
    backend: str, programs: int, flex_gradients: None
) -> None:
    """varlen: the second microbatch makes the number of documents and the longest ones variables of the program."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter)
    def layer(query: Tensor, key: Tensor, value: Tensor, plan: ContextPlan) -> Tensor:
        return context_attention(query * 2, key, value, plan, ALONE, "all-to-all", backend) + 1

    for seed, density in enumerate((0.02, 0.05, 0.3, 0.9)):
        generator = torch.Generator().manual_seed(seed)
        ids = (torch.rand(2, 256, generator=generator) < density).cumsum(1)
        inputs, first = random_inputs((2, 2, 256, 2, 16)), piece_starts(ids)
        plan = plan_context(first, torch.float64, ALONE, "all-to-all", backend, document_bounds(ids))
        expected = attention_sdpa(inputs[0] * 2, *inputs[1:], plan_for_sdpa(first)) + 1
        assert_same(layer(*inputs, plan), expected, inputs)
    assert counter.frame_count == programs


def test_gradcheck_through_the_stand_ins() -> None:
    first = piece_starts(torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]]))
    inputs = random_inputs((2, 1, 5, 2, 2))
    for call, plan in (
        (attention_varlen.attention_varlen, plan_varlen(first)),
        (attention_varlen.attention_cudnn, plan_cudnn(first)),
    ):
        # torch itself hands a missing gradient on to the operation
        torch.autograd.gradcheck(lambda *x, call=call, plan=plan: call(*x, plan), inputs, check_undefined_grad=False)


def test_one_document_a_row_is_left_to_sdpa() -> None:
    ids = torch.zeros(2, 6, dtype=torch.int32)
    first, bounds, inputs = piece_starts(ids), document_bounds(ids), random_inputs((2, 2, 6, 2, 4))
    expected = attention_sdpa(*inputs, None)
    assert plan_varlen(first, bounds) == plan_cudnn(first, bounds) == VarlenPlan(())
    assert plan_flex(first, divided=False) == FlexPlan(())
    assert torch.equal(attention_varlen.attention_varlen(*inputs, VarlenPlan(())), expected)
    assert torch.equal(attention_flex.attention_flex(*inputs, FlexPlan(())), expected)
    # with queries of some positions it is not plain causality
    assert plan_varlen(first, bounds, torch.arange(3, 6)).pieces


def test_sizes_of_tensors_and_launches() -> None:
    first = torch.empty(4, 4096, dtype=torch.int64, device="meta")
    (piece,) = plan_varlen(first, DocumentBounds(65, 700)).pieces
    assert piece.query_starts.shape == (73,) and piece.longest_query == piece.longest_key == 768
    (piece,) = plan_cudnn(first, DocumentBounds(65, 700)).pieces
    assert piece.query_starts.shape == (129,) and piece.longest_query == 1024
    (piece,) = plan_cudnn(first, DocumentBounds(65, 70)).pieces
    assert piece.longest_query == 256
    (piece,) = plan_varlen(first, DocumentBounds(16384, 1)).pieces
    assert piece.longest_query == 128, "of documents of one position too"


def test_with_bounds_no_number_of_a_device_is_asked_for() -> None:
    """A meta tensor has none: whoever asks fails."""
    first, bounds = torch.empty(4, 4096, dtype=torch.int64, device="meta"), DocumentBounds(65, 700)
    positions = torch.cat((torch.arange(512, 1024), torch.arange(3072, 3584)))
    for backend in ("sdpa", "varlen", "cudnn", "flex", "unfused"):
        plan_context(first, torch.bfloat16, ALONE, "all-to-all", backend, bounds)
    assert len(plan_varlen(first, bounds, positions).pieces) == 2
    assert len(plan_flex(first, True, positions).pieces) == 2
    assert len(plan_pieces(first, positions, divided=True)) == 2
    assert plan_for_sdpa(first, divided=False) is None


def test_shapes_of_torchs_own_kernels_on_meta_tensors() -> None:
    made = {"dtype": torch.bfloat16, "device": "meta"}
    inputs = [x.detach().requires_grad_() for x in random_inputs((2, 2, 256, 4, 64), **made)]
    plan = plan_varlen(torch.empty(2, 256, dtype=torch.int64, device="meta"), DocumentBounds(9, 100))
    for out in (
        attention_varlen.attention_varlen(*inputs, plan),
        attention_varlen.attention_cudnn(*inputs, VarlenPlan(())),
    ):
        assert out.shape == (2, 256, 512) and out.dtype == torch.bfloat16
        grads = torch.autograd.grad(out, inputs, torch.empty_like(out))
        assert [g.shape for g in grads] == [x.shape for x in inputs]


def test_projections_are_packed_without_a_copy() -> None:
    query, key, _ = random_inputs((2, 2, 5, 3, 4))
    for x in (query, key):
        packed = attention_varlen._packed(x)
        assert packed.shape == (10, x.shape[1] * x.shape[3], 4) and packed.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("backend", ["varlen", "cudnn", "flex", "unfused"])
def test_the_context_seam_runs_each(backend: str, flex_gradients: None) -> None:
    ids = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2], [0] * 8, [0, 1, 2, 3, 4, 5, 6, 7]])
    inputs, first = random_inputs((3, 2, 8, 2, 4)), piece_starts(ids)
    plan = plan_context(first, torch.float64, ALONE, "all-to-all", backend, document_bounds(ids))
    expected = attention_sdpa(*inputs, plan_for_sdpa(first))
    assert_same(context_attention(*inputs, plan, ALONE, "all-to-all", backend), expected, inputs)


def test_cudnn_needs_all_of_a_documents_queries() -> None:
    with pytest.raises(UnavailableError, match="context_method to all-to-all, or kernels.attention to varlen"):
        plan_cudnn(torch.zeros(1, 8, dtype=torch.int64), DocumentBounds(1, 8), torch.arange(4))


def gpu_call(**changed: object) -> AttentionCall:
    call = {
        "device": torch.device("cuda"), "dtype": torch.bfloat16, "head_dim": 128, "torch": (2, 11),
        "capability": (9, 0), "cudnn": 91900,
    }  # fmt: skip
    return AttentionCall(**(call | changed))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, ["sdpa", "varlen", "flex", "unfused"]),
        ({"documents": False}, ["sdpa", "varlen", "cudnn", "flex", "unfused"]),
        ({"torch": (2, 15)}, ["sdpa", "varlen", "cudnn", "flex", "unfused"]),
        ({"torch": (2, 15), "gathered": True}, ["sdpa", "varlen", "flex", "unfused"]),
        ({"torch": (2, 15), "cudnn": 91300}, ["sdpa", "varlen", "flex", "unfused"]),
        ({"torch": (2, 15), "capability": (8, 0)}, ["sdpa", "varlen", "flex", "unfused"]),
        ({"dtype": torch.float32}, ["sdpa", "flex", "unfused"]),
        ({"head_dim": 12}, ["sdpa", "unfused"]),
        ({"head_dim": 192, "documents": False}, ["sdpa", "varlen", "flex", "unfused"]),
        ({"capability": (7, 5)}, ["sdpa", "unfused"]),
    ],
)
def test_candidates(changed: dict[str, object], expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert attention_candidates(gpu_call(**changed)) == expected


def test_candidates_and_reasons_here() -> None:
    call = attention_call(torch.device("cpu"), torch.float32, 64, "2.13.0+cpu")
    assert call.torch == (2, 13)
    assert attention_candidates(call) == ["sdpa", "blockwise", "unfused"]
    assert attention_obstacle("varlen", call) == "it is a kernel for GPUs, and the model is on cpu"
    assert "no backward pass on cpu" in str(attention_obstacle("flex", call))
    assert "before torch 2.15" in str(attention_obstacle("cudnn", gpu_call()))
    assert attention_obstacle("varlen", gpu_call(head_dim=100)) == (
        "its kernels have head sizes from 8 to 256 in steps of 8, and head_dim is 100"
    )


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("backend", ["sdpa", "varlen", "cudnn", "flex", "unfused"])
def test_on_a_gpu_without_waiting(backend: str, documents: bool) -> None:
    """In bfloat16 against float64 on the CPU, within thrice the error of torch's own with a mask."""
    device = torch.device("cuda")
    why = attention_obstacle(backend, attention_call(device, torch.bfloat16, 64, documents=documents))
    if why is not None:
        pytest.skip(f"{backend} cannot run here: {why}")
    ids = (torch.rand(2, 512) < 0.01).cumsum(1) if documents else torch.zeros(2, 512, dtype=torch.int64)
    exact = random_inputs((2, 2, 512, 4, 64))
    inputs = [x.detach().bfloat16().to(device).requires_grad_() for x in exact]
    exact = [x.detach().double().cpu().requires_grad_() for x in inputs]
    expected = attention_sdpa(*exact, plan_for_sdpa(piece_starts(ids)))
    upstream = torch.randn(expected.shape).bfloat16()
    wanted = (expected, *torch.autograd.grad(expected, exact, upstream.double()))
    first, bounds, grad = piece_starts(ids.to(device)), document_bounds(ids), upstream.to(device)

    def run(name: str) -> tuple[Tensor, ...]:
        plan = plan_context(first, torch.bfloat16, ALONE, "all-to-all", name, bounds)
        out = context_attention(*inputs, plan, ALONE, "all-to-all", name)
        return out, *torch.autograd.grad(out, inputs, grad)

    theirs = [(a.double().cpu() - b).square().mean().sqrt() for a, b in zip(run("sdpa"), wanted, strict=True)]
    run(backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = run(backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got, want, error in zip(ours, wanted, theirs, strict=True):
        assert (got.double().cpu() - want).square().mean().sqrt() <= 3 * error + 1e-4
