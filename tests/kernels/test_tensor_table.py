"""Tables of tensors and blocks against a plain walk over them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.kernels import tensor_table
from megatron.kernels.tensor_table import addresses, block_map, uploaded

CPU = torch.device("cpu")


@given(st.lists(st.integers(0, 40), max_size=8), st.integers(1, 12), st.randoms(use_true_random=False))
def test_blocks_cover_the_chosen_tensors_in_order(sizes: list[int], block: int, random) -> None:  # type: ignore[no-untyped-def]
    chosen = tuple(sorted(random.sample(range(len(sizes)), random.randint(0, len(sizes)))))
    walked = [(index, number) for index in chosen for number in range(-(-sizes[index] // block))]
    owners, numbers = block_map(tuple(sizes), chosen, block, CPU)
    assert (owners.dtype, numbers.dtype) == (torch.int32, torch.int32)
    assert list(zip(owners.tolist(), numbers.tolist(), strict=True)) == walked


def test_a_table_is_kept_under_its_numbers() -> None:
    tensors = [torch.zeros(3), torch.zeros(4, dtype=torch.int16)[1:]]
    table = uploaded(addresses(tensors), torch.int64, CPU)
    assert table.tolist() == [tensors[0].data_ptr(), tensors[1].data_ptr()]
    assert uploaded(addresses(tensors), torch.int64, CPU) is table
    assert uploaded(addresses(tensors[:1]), torch.int64, CPU) is not table


def test_nothing_is_uploaded_into_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="a CUDA graph is captured over tensors that were not there"):
        tensor_table.uploaded((1, 2, 3, 4, 5), torch.int64, torch.device("cuda", 0))
