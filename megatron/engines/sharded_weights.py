"""Master weights over many ranks: FSDP2 (torch.distributed.fsdp.fully_shard) on the data axis, by `data_shard`.

    none        replicas, each with all masters; gradients summed after the last microbatch
    optimizer   masters, moments and reduced gradients in shards; weights gathered once a step
    gradients   the same, with gradients reduced after every microbatch
    full        weights gathered for each layer when it runs, and dropped again

Context ranks hold parts of the same samples, so that to gradients they are data ranks. Tensor ranks each wrap their own
slices, and know nothing of each other here. Gradients are summed, not averaged: the loss is already divided.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from megatron.engines.held import Held
from megatron.models.decoder import Decoder
from megatron.models.parameter_cuts import parameter_cuts
from megatron.parallel.mesh import Mesh
from megatron.parallel.model_place import ParameterCut

DataShard = Literal["none", "optimizer", "gradients", "full"]


class ShardedWeights:
    """Wraps modules that lie on the meta device, and gives them memory. `held`: this rank's masters."""

    def __init__(
        self, modules: Sequence[Decoder], mesh: Mesh, data_shard: DataShard, compute_dtype: torch.dtype
    ) -> None:
        self.modules: Sequence[nn.Module] = modules
        self._mesh = mesh
        self._each_microbatch = data_shard in ("gradients", "full")
        self._keep_gathered = data_shard != "full"
        cuts = [parameter_cuts(module) for module in modules]
        shapes = [{name: tuple(p.shape) for name, p in module.named_parameters()} for module in modules]
        for module in modules:
            _wrap(module, mesh, compute_dtype, gather_again=data_shard == "full")
            module.to_empty(device=mesh.device)
        self._wrapped = [part for module in modules for part in module.modules() if isinstance(part, FSDPModule)]
        for part in self._wrapped:
            # Sums, not means; and not through NCCL's scaled sum, which gloo lacks.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
        self.held = [
            self._hold(module, name, cut, shapes[number][name])
            for number, module in enumerate(modules)
            for name, cut in cuts[number].items()
        ]

    def _hold(self, module: Decoder, name: str, cut: ParameterCut, local: tuple[int, ...]) -> Held:
        parameter = module.get_parameter(name)
        assert isinstance(parameter, DTensor)
        tensor, axis = parameter.detach().to_local(), self._mesh.tensor
        whole, offset = cut.shape_of_whole(local, axis), list(cut.offset_of(local, axis))
        place = self._mesh.shards.get_coordinate()
        size, number = self._mesh.shards.shape[-1], place[-1]
        rows = -(-local[0] // size)  # FSDP2 cuts the first dimension as torch.chunk does
        first = min(number * rows, local[0])
        assert tensor.shape[0] == min(rows, local[0] - first), name
        offset[0] += first
        copy = name == "embedding.weight" and not module.place.first
        first_replica = not any(place[:-1])
        owned = first_replica and not copy and (cut.dim is not None or axis.rank == 0)
        return Held(name, tensor, whole, tuple(offset), owned, cut.partial, copy, lambda: _local(parameter.grad))

    def before_backward(self, last: bool) -> None:
        """Told before each microbatch's forward pass, and whether it is the step's last."""
        for part in self._wrapped:
            part.set_requires_gradient_sync(last or self._each_microbatch, recurse=False)
            part.set_reshard_after_backward(last or not self._keep_gathered, recurse=False)

    def collect(self) -> None:
        """Nothing to do: FSDP2 adds up and reduces in float32."""

    def copies(self) -> dict[str, Tensor]:
        """None: FSDP2 casts what it gathers."""
        return {}

    def refresh(self, written: bool = False) -> None:
        """Drops gathered copies, so that the next forward pass gathers the masters as they are now."""
        for part in self._wrapped:
            part.reshard()

    def looked(self) -> None:
        """Drops gathered copies, which an evaluation leaves behind."""
        self.refresh()

    def drop_gradients(self) -> None:
        """Forgets all gradients."""
        for module in self.modules:
            module.zero_grad(set_to_none=True)


def _wrap(module: Decoder, mesh: Mesh, compute_dtype: torch.dtype, gather_again: bool) -> None:
    """Each layer, then what is left: embedding, last norm, head."""
    master = next(module.parameters()).dtype
    narrow = compute_dtype != master
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=master) if narrow else MixedPrecisionPolicy()
    for layer in module.layers.values():
        fully_shard(layer, mesh=mesh.shards, reshard_after_forward=gather_again, mp_policy=policy)
    fully_shard(module, mesh=mesh.shards, reshard_after_forward=gather_again, mp_policy=policy)


def _local(gradient: Tensor | None) -> Tensor | None:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
