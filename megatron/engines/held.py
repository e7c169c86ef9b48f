"""What a rank holds of the model's parameters: local tensors, and where each lies in the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.checkpoint.tensor_shards import TensorShard, TensorSource
from megatron.config.errors import CheckpointError
from megatron.kernels.adamw import join_master, split_master
from megatron.parallel.axis import Axis
from megatron.parallel.mesh import Mesh, sum_over, sum_over_ends

Squares = Callable[[Sequence[Tensor], torch.device], Tensor]
"""(tensors, device) -> the sum of the squares of all elements, float64 without dimensions, on the device."""


def of_all_tensors(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """`Squares` by torch's multi-tensor norm, in float32 at least."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    wide = torch.float64 if tensors and tensors[0].dtype == torch.float64 else torch.float32
    for norm in torch._foreach_norm(list(tensors), 2, wide) if tensors else []:
        total += norm.double().square()
    return total


@dataclass(frozen=True)
class Held:
    """One parameter as it lies here.

    name: global. local: the master values held here, a live tensor, perhaps empty. shape, offset: of the whole, and
    where the local box begins. owned: of all ranks that hold the same box, this one counts it in the norm and writes
    it. partial: the gradient is a part of a sum over the tensor ranks. copy: a tied head's own embedding.
    gradient: gives the local gradient, None before the first backward pass. low: where `local` is the bfloat16 high
    half of a float32 master, its int16 low half (`kernels/adamw.py`).
    """

    name: str
    local: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    owned: bool
    partial: bool
    copy: bool
    gradient: Callable[[], Tensor | None]
    low: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the master values."""
        return self.local.dtype if self.low is None else torch.float32

    def master(self) -> Tensor:
        """The master values held here: the live tensor, or a new one, joined of both halves."""
        return self.local if self.low is None else join_master(self.local, self.low)

    @torch.no_grad()
    def take(self, values: Tensor) -> None:
        """Sets the master values held here."""
        if self.low is None:
            self.local.copy_(values)
            return
        high, low = split_master(values.float())
        self.local.copy_(high)
        self.low.copy_(low)

    @property
    def key(self) -> str:
        """The name among those held here: a copy stands beside the embedding itself on the rank that has both."""
        return f"{self.name} (copy)" if self.copy else self.name

    def shard(self, tensor: Tensor) -> TensorShard:
        """A tensor that lies as the parameter does, or a number that goes with it."""
        if tensor.ndim == 0 and self.shape:
            return TensorShard(tensor, (), ())
        return TensorShard(tensor, self.shape, self.offset)

    @property
    def begins(self) -> bool:
        """Whether the whole tensor's first element is here."""
        return not any(self.offset) and self.local.numel() > 0


def fill(held: Iterable[Held], source: TensorSource) -> None:
    """Copies weights in; nothing is changed where a name, a shape or a dtype does not fit."""
    held = list(held)
    for item in held:
        dtype = source.dtype(item.name)
        if source.shape(item.name) != item.shape or torch.promote_types(dtype, item.dtype) != item.dtype:
            raise CheckpointError(
                f"weight {item.name} is {dtype} {list(source.shape(item.name))}, "
                f"the model needs {item.dtype} {list(item.shape)}"
            )
    for item in held:
        item.take(source.read(item.name, item.offset, tuple(item.local.shape)))


class MasterShards(Mapping[str, Sequence[TensorShard]]):
    """What a rank writes of its masters, by name; of those that are kept in halves each is joined when it is asked for,
    and not kept, so that a checkpoint needs no second set of them."""

    def __init__(self, held: Iterable[Held]) -> None:
        self._held = {item.name: item for item in held}

    def __getitem__(self, name: str) -> list[TensorShard]:
        item = self._held[name]
        return [item.shard(item.master())]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def check_names(wanted: Iterable[str], source: TensorSource) -> None:
    """Raises CheckpointError where a source's names are not those of the whole model."""
    wanted, given = set(wanted), set(source.names())
    if missing := sorted(wanted - given):
        raise CheckpointError(f"weights lack {', '.join(missing)}: another model wrote them")
    if unknown := sorted(given - wanted):
        raise CheckpointError(f"weights have unknown {', '.join(unknown)}: another model wrote them")


def finish_gradients(held: Iterable[Held], mesh: Mesh, tied_apart: bool) -> None:
    """What backward passes leave open: sums over the tensor ranks of partial gradients, and of tied weights.

    tied_apart: the first and the last pipeline rank both hold a tied embedding.
    """
    held = list(held)
    _sum_flat([item.gradient() for item in held if item.partial], mesh.tensor)
    tied = [item for item in held if item.copy]
    originals = {item.name: item for item in held if not item.copy}
    for item in tied:
        if item.name in originals:
            mine, other = item.gradient(), originals[item.name].gradient()
            assert mine is not None and other is not None
            other.add_(mine)
            mine.copy_(other)
    for item in held:
        gradient = item.gradient()
        if tied_apart and item.name == "embedding.weight" and gradient is not None and gradient.numel():
            sum_over_ends(gradient, mesh.pipeline)


def _sum_flat(gradients: list[Tensor | None], axis: Axis) -> None:
    """Sums the gradients over an axis in one message."""
    tensors = [gradient for gradient in gradients if gradient is not None]
    if axis.alone or not tensors:
        return
    flat = sum_over(torch.cat([tensor.reshape(-1) for tensor in tensors]), axis)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def squared_norm(
    gradients: Mapping[str, Tensor], held: Iterable[Held], mesh: Mesh, squares: Squares = of_all_tensors
) -> Tensor:
    """The square of the whole gradient's 2-norm, float64, the same on every rank: each element counts once."""
    mine = [gradients[item.key] for item in held if item.owned and item.local.numel()]
    return sum_of_squares(mine, mesh.everyone, mesh.device, squares)


def sum_of_squares(
    tensors: Sequence[Tensor], axis: Axis, device: torch.device, squares: Squares = of_all_tensors
) -> Tensor:
    """Of all elements of the tensors of all ranks of the axis, float64, the same on every one."""
    return sum_over(squares(tensors, device), axis)
