"""What is allocated: by a forward pass that has returned, and at the fullest moment of a whole step of real ranks."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from engines.made_rows import Micro
from ranks import run_ranks
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron.config.layout import resolve_layout
from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.schema import ModelSection, OptimizerSection, ParallelSection, TrainSection
from megatron.engines.build import build_engine
from megatron.kernels.choice import Kernels
from megatron.models.decoder import Decoder
from megatron.models.joined import join
from megatron.models.recompute import apply_recompute
from megatron.parallel.mesh import close_mesh, launched, one_process_mesh, open_mesh
from megatron.parallel.model_place import ModelPlace

Recompute = tuple[str, str, int | None]
"""parallel.recompute, recompute_policy, recompute_layers."""


class Allocations(TorchDispatchMode):
    """Every allocation that an operation has made, for as long as anybody holds it."""

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                reference = StorageWeakRef(tensor.untyped_storage())
                held = self._held.get(reference.cdata)
                if held is None or held.expired():
                    self._held[reference.cdata] = reference
        return out

    def alive(self, others: set[int]) -> int:
        """Bytes of what is still held, storages at these addresses left out."""
        total = 0
        for reference in self._held.values():
            storage = None if reference.expired() else torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is not None and storage.data_ptr() not in others:
                total += storage.nbytes()
        return total


def forward_keeps(
    shape: ModelShape,
    place: ModelPlace,
    kernels: Kernels,
    rows: int,
    length: int,
    dtype: torch.dtype,
    joined: bool,
    recompute: Recompute,
    documents: Tensor | None = None,
) -> int:
    """Bytes that a rank's forward pass leaves behind besides parameters, the microbatch and what it returns. The hidden
    states that enter a later stage are its microbatch; those that leave an earlier one count as kept."""
    model = Decoder(shape, kernels, place).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    if joined:
        join(model)
    apply_recompute(model, *recompute)
    words = torch.randint(0, shape.vocab_size, (rows, length))
    documents = torch.zeros(rows, length, dtype=torch.int32) if documents is None else documents
    numbers, x = torch.arange(rows), words
    if not place.first:
        parts = place.context.size * (place.tensor.size if place.sequence else 1)
        x = torch.randn(rows, length // parts, shape.hidden_size, dtype=dtype, requires_grad=True)
    if shape.rope_scaling is not None:
        model(x, documents, words, 1.0, numbers)  # scaled frequencies are kept for good
    given = (*model.parameters(), words, documents, numbers, x)
    addresses = {tensor.untyped_storage().data_ptr() for tensor in given}
    with Allocations() as allocations:
        out = model(x, documents, words, 1.0, numbers)
    returned = sum(tensor.untyped_storage().nbytes() for tensor in out) if place.last else 0
    return allocations.alive(addresses) - returned


@dataclass(frozen=True)
class Run:
    """Steps of a layout. microbatches: in a step of each data rank, of `rows` rows."""

    world: int
    model: Mapping[str, Any]
    parallel: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    precision: str = "fp32"
    kernels: Mapping[str, Any] | None = None
    microbatches: int = 2
    rows: int = 4
    gradients: str = "fp32"

    @property
    def shape(self) -> ModelShape:
        """The decoder."""
        return resolve_model(ModelSection(**self.model), 1)

    @property
    def section(self) -> ParallelSection:
        """The layout."""
        return ParallelSection(**self.parallel)

    @property
    def train(self) -> TrainSection:
        """Batch and precision."""
        size = self.microbatches * self.rows * resolve_layout(self.section, self.world).data
        return TrainSection(
            global_batch_size=size,
            micro_batch_size=self.rows,
            precision=self.precision,  # type: ignore[arg-type]
            gradients=self.gradients,  # type: ignore[arg-type]
        )


def step_peaks(run: Run, timeout: float = 120) -> list[int]:
    """Bytes of all tensors at the fullest moment of the third step, by rank: those of torch's CPU allocator, as its
    profiler records every allocation, and those that were there before the step."""
    return run_ranks(run.world, _peak, run, timeout=timeout)


def _peak(run: Run) -> int:
    torch.set_num_threads(1)
    layout = resolve_layout(run.section, run.world)
    mesh = one_process_mesh() if run.world == 1 else open_mesh(layout, launched(), 120)
    optimizer, kernels = OptimizerSection(**run.optimizer), Kernels(**(run.kernels or {}))
    engine = build_engine(run.shape, optimizer, run.section, run.train, 0, run.precision, mesh, kernels=kernels)
    batch = [_microbatch(run, number + 100 * mesh.rank) for number in range(run.microbatches)]
    for _ in range(2):
        engine.train_step(batch, 1e-4)
    before = _held_now()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        engine.train_step(batch, 1e-4)
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = before
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    if run.world > 1:
        close_mesh()
    return most


def _microbatch(run: Run, seed: int) -> Micro:
    shape, drawn = run.shape, torch.Generator().manual_seed(seed)
    words = torch.randint(0, shape.vocab_size, (run.rows, shape.max_position_embeddings + 1), generator=drawn)
    ids = torch.zeros(run.rows, shape.max_position_embeddings, dtype=torch.int32)
    sources, numbers = torch.zeros(run.rows, dtype=torch.int64), torch.arange(run.rows)
    return Micro(words[:, :-1].contiguous(), words[:, 1:].contiguous(), ids, sources, numbers)


def _held_now() -> int:
    gc.collect()
    found: dict[int, int] = {}
    for item in gc.get_objects():
        if issubclass(type(item), Tensor):  # isinstance would ask torch's deprecated names, and warn
            storage = getattr(item, "_local_tensor", item).untyped_storage()
            if storage.device.type == "cpu":
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())
