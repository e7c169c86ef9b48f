"""Runs of a tensor's elements as boxes: every element once, whatever the shape and the cut."""

from __future__ import annotations

from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.checkpoint.tensor_shards import WholeTensors
from megatron.engines.deepspeed_pieces import Piece, Run, boxes_of_run
from megatron.parallel.axis import Axis
from megatron.parallel.model_place import ParameterCut

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@given(SHAPES, st.data())
def test_boxes_of_a_run_are_the_run(shape: tuple[int, ...], data: st.DataObject) -> None:
    size = prod(shape)
    start = data.draw(st.integers(0, size))
    count = data.draw(st.integers(0, size - start))
    whole = torch.arange(size).view(shape)
    run = whole.reshape(-1)[start : start + count]
    seen = torch.zeros(shape, dtype=torch.int64)
    for first, offset, box in boxes_of_run(shape, start, count):
        where = tuple(slice(begin, begin + length) for begin, length in zip(offset, box, strict=True))
        assert torch.equal(run[first : first + prod(box)].view(box), whole[where])
        seen[where] += 1
    assert torch.equal(seen.reshape(-1).nonzero().flatten(), run) and int(seen.max()) <= 1


@given(st.integers(1, 6), st.integers(1, 5), st.sampled_from([None, 0, 1]), st.integers(1, 4))
def test_ranks_write_the_whole_and_read_it_back(rows: int, columns: int, dim: int | None, ranks: int) -> None:
    local = (rows, columns)
    cut = ParameterCut(dim)
    whole = torch.randn(cut.shape_of_whole(local, Axis(0, 2)))
    size = -(-rows * columns // ranks)
    seen = torch.zeros(whole.shape)
    for tensor in range(2):
        for rank in range(ranks):
            start = min(rank * size, rows * columns)
            held = torch.zeros(min(size, rows * columns - start))
            piece = Piece(
                "w", local, cut, Axis(tensor, 2), dim is not None or tensor == 0, lambda s=start, h=held: Run(s, h)
            )
            piece.read(WholeTensors({"w": whole}), "w")
            assert piece.begins == (rank == 0 and tensor == 0)
            for shard in piece.shards():
                where = tuple(slice(o, o + n) for o, n in zip(shard.offset, shard.tensor.shape, strict=True))
                assert shard.shape == tuple(whole.shape) and torch.equal(shard.tensor, whole[where])
                seen[where] += 1
    assert bool((seen == 1).all())
