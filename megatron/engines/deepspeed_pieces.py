"""What ZeRO leaves on a rank: a run of each parameter's elements, in row-major order, with its optimizer state.

Runs know no rows, and checkpoints hold boxes: a run is at most one piece of a row, whole rows, and another piece of a
row, so that each rank writes what it holds and reads little more, without a word to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn

from megatron.checkpoint.tensor_shards import TensorShard, TensorSource
from megatron.models.decoder import Decoder
from megatron.models.parameter_cuts import parameter_cuts
from megatron.parallel.axis import Axis
from megatron.parallel.model_place import ParameterCut


@dataclass(frozen=True)
class LocalParameter:
    """One parameter held here. shape: local. copy: a tied head's own embedding; tied: it, or what it is a copy of, on
    another pipeline rank."""

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    cut: ParameterCut
    copy: bool
    tied: bool

    def gradient(self) -> Tensor:
        """What backward passes have left: DeepSpeed's own float32 sum where it keeps one. RuntimeError where none."""
        wide = getattr(self.parameter, "_hp_grad", None)
        found = self.parameter.grad if wide is None else wide
        if found is None:
            raise RuntimeError(f"no gradient reached {self.name}")
        return found


def parameters_of(module: Decoder) -> list[LocalParameter]:
    """All parameters of a module, in its order."""
    cuts, place = parameter_cuts(module), module.place
    tied = module.shape.tie_word_embeddings and not (place.first and place.last)
    return [
        LocalParameter(name, p, tuple(p.shape), cuts[name], name == "embedding.weight" and not place.first, tied)
        for name, p in module.named_parameters()
    ]


@dataclass(frozen=True)
class Run:
    """Elements `start` and on of a parameter's local tensor, as one live float32 vector, and state that lies alike."""

    start: int
    master: Tensor
    state: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Piece:
    """A rank's part of one parameter.

    name: global. local: the shape on this tensor rank. cut, tensor: how that lies in the whole. owned: of the ranks
    that hold the same run, this one writes it. run: gives what is held now, None where nothing is.
    """

    name: str
    local: tuple[int, ...]
    cut: ParameterCut
    tensor: Axis
    owned: bool
    run: Callable[[], Run | None]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self.cut.shape_of_whole(self.local, self.tensor)

    @property
    def begins(self) -> bool:
        """Whether the whole tensor's first element is here, and this rank writes it."""
        run = self.run()
        return self.owned and run is not None and run.start == 0 and not any(self._offset((0,) * len(self.local)))

    def shards(self, key: str | None = None) -> list[TensorShard]:
        """The boxes of the master (or of the state `key`) that this rank is to write: views, not copies."""
        run = self.run()
        if run is None or not self.owned:
            return []
        values = run.master if key is None else run.state[key]
        return [
            TensorShard(values[first : first + prod(box)].view(box), self.shape, self._offset(offset))
            for first, offset, box in boxes_of_run(self.local, run.start, values.numel())
        ]

    @torch.no_grad()
    def read(self, source: TensorSource, name: str, key: str | None = None) -> None:
        """Copies the source's values of this run into the master, or into the state `key`."""
        run = self.run()
        if run is None or run.master.numel() == 0:
            return
        values = run.master if key is None else run.state[key]
        width = prod(self.local[1:])
        first, last = run.start // width, -(-(run.start + values.numel()) // width)
        offset, box = (first, *(0 for _ in self.local[1:])), (last - first, *self.local[1:])
        rows = source.read(name, self._offset(offset), box).reshape(-1)
        skipped = run.start - first * width
        values.copy_(rows[skipped : skipped + values.numel()])

    def _offset(self, within: Sequence[int]) -> tuple[int, ...]:
        begin = self.cut.offset_of(self.local, self.tensor)
        return tuple(a + b for a, b in zip(begin, within, strict=True))


def boxes_of_run(shape: Sequence[int], start: int, count: int) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """The run of `count` elements from `start` on of a row-major tensor, as boxes in order.

    Each is (where it begins in the run, its offset in the tensor, its shape); they cover the run exactly once.
    """
    if count == 0:
        return []
    if len(shape) == 1:
        return [(0, (start,), (count,))]
    width = prod(shape[1:])
    boxes = []
    done = 0
    while done < count:
        row, column = divmod(start + done, width)
        rows = (count - done) // width if column == 0 else 0
        if rows:
            boxes.append((done, (row, *(0 for _ in shape[1:])), (rows, *shape[1:])))
            done += rows * width
            continue
        part = min(width - column, count - done)
        for first, offset, box in boxes_of_run(shape[1:], column, part):
            boxes.append((done + first, (row, *offset), (1, *box)))
        done += part
    return boxes


def run_of(parameter: nn.Parameter, states: Mapping[Tensor, Mapping[str, Tensor]]) -> Run | None:
    """What DeepSpeed holds here of a parameter's float32 master.

    states: the inner optimizer's state, by the tensor that it updates.
    """
    if hasattr(parameter, "ds_id"):  # ZeRO-3: equal runs, the last ones padded
        optimizer = parameter._z3_optimizer
        group, begin, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        flat = optimizer.fp32_partitioned_groups_flat[group]
        start = size * optimizer._get_param_partition_rank(parameter)
        size = max(0, min(size, parameter.ds_numel - start))
        state = {key: value for key, value in states.get(flat, {}).items() if _as_long(value, flat)}
        return Run(start, flat.detach()[begin : begin + size], {k: v[begin : begin + size] for k, v in state.items()})
    if hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2: one vector of all parameters, cut without regard to them
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        address = mapping.lp_fragment_address
        return Run(address.start, mapping.hp_fragment.detach(), mapping.optim_fragment or {})
    values = parameter.detach()
    state = {key: value for key, value in states.get(parameter, {}).items() if _as_long(value, parameter)}
    return Run(0, values.view(-1), {key: value.view(-1) for key, value in state.items()})


def _as_long(value: object, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == flat.shape
