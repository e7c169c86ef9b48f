"""The engine on DeepSpeed: ZeRO 0 to 3, and AdamW on the host. The one file that imports deepspeed.

DeepSpeed runs backward, sums gradients over the data ranks, clips and updates. What a run's meaning hangs on is
said here: how the loss is scaled, which microbatch is the last, the learning rate, what is kept and restored.

    ZeRO 0     our masters and torch's optimizer; DeepSpeed sums the gradients, the engine clips (DeepSpeed would not
               tell the norm)
    ZeRO 1-3   DeepSpeed's float32 masters, cut over the data ranks; a gradient norm that is not finite makes it drop
               the step, gradients and all; one beyond its bound is shown to it as infinite (`deepspeed_norm.py`)
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.checkpoint.tensor_shards import TensorShards, TensorSource
from megatron.config.errors import UnavailableError
from megatron.config.schema import OptimizerSection, ParallelSection, TrainSection
from megatron.engines.base import Bounds, DoneStep, MicrobatchLike
from megatron.engines.deepspeed_config import ZERO_STAGES, deepspeed_config, refuse_what_deepspeed_cannot
from megatron.engines.deepspeed_norm import BoundedNorm
from megatron.engines.deepspeed_pieces import LocalParameter, Piece, parameters_of, run_of
from megatron.engines.deepspeed_ranks import DeepSpeedRanks
from megatron.engines.deepspeed_state import DeepSpeedState
from megatron.engines.held import sum_of_squares
from megatron.engines.master_weights import MasterWeights
from megatron.engines.mesh_engine import MeshEngine, beyond, not_finite, step_result
from megatron.engines.model_parts import ModelParts, build_pipeline, whole_parameters
from megatron.engines.precision import COMPUTE_DTYPES
from megatron.engines.row_losses import valid_targets
from megatron.models.recompute import apply_recompute
from megatron.optim.build import build_optimizer
from megatron.optim.groups import parameter_groups
from megatron.parallel.mesh import Mesh, state_local_rank, sum_over, sum_over_ends
from megatron.parallel.pipeline import Rows


def build_deepspeed_engine(
    parts: ModelParts,
    mesh: Mesh,
    optimizer: OptimizerSection,
    parallel: ParallelSection,
    precision: str,
    description: Mapping[str, str],
    train: TrainSection | None = None,
) -> DeepSpeedEngine:
    """The engine over modules that lie on the meta device; weights are 0 until `load_model_state`.

    train: where given, the batch sizes in the user's own DeepSpeed JSON may repeat its.
    Raises UnavailableError and ConfigError for what DeepSpeed cannot do, by key.
    """
    refuse_what_deepspeed_cannot(parallel, optimizer, precision)
    state_local_rank()
    return DeepSpeedEngine(parts, mesh, optimizer, parallel, precision, description, train)


class DeepSpeedEngine(MeshEngine):
    """Implements `Engine`."""

    def __init__(
        self,
        parts: ModelParts,
        mesh: Mesh,
        optimizer: OptimizerSection,
        parallel: ParallelSection,
        precision: str,
        description: Mapping[str, str],
        train: TrainSection | None,
    ) -> None:
        super().__init__(mesh, whole_parameters(parts.modules[0].shape), description)
        self._section = optimizer
        self._stage = ZERO_STAGES[parallel.data_shard]
        held = sum(p.numel() for module in parts.modules for p in module.parameters())
        config = deepspeed_config(parallel, optimizer, precision, held, train)
        _open_alone(mesh)
        deepspeed = _deepspeed()
        for module in parts.modules:
            module.to_empty(device=mesh.device)
        self._parameters = [part for module in parts.modules for part in parameters_of(module)]
        self._ranks = DeepSpeedRanks.of(mesh)
        self._mark()
        dtype = COMPUTE_DTYPES[precision]
        self._masters = [MasterWeights(module, dtype) for module in parts.modules] if self._stage == 0 else []
        computing = [master.modules[0] for master in self._masters] or list(parts.modules)
        for module in computing:
            apply_recompute(module, parallel.recompute, parallel.recompute_policy, parallel.recompute_layers)
        built = self._build_optimizer(deepspeed, parallel.offload == "optimizer")
        whole = parts.modules[0] if len(parts.modules) == 1 else nn.ModuleList(parts.modules)
        with _quiet():
            self._engine, *_ = deepspeed.initialize(
                model=whole, optimizer=built, config=config, mpu=self._ranks, dist_init_required=False
            )
        self._inner = self._engine.basic_optimizer
        self._norm = self._bounded_norm(deepspeed) if self._stage else None
        self._modules = computing
        self._model: Callable[..., Any] = computing[0] if self._masters else self._engine
        for master in self._masters if parallel.pipeline > 1 else []:
            master.collect_at_once()
        self._pipeline = build_pipeline(parts, computing, parallel, mesh, dtype)
        pieces = [self._piece(part) for part in self._parameters]
        self._state = DeepSpeedState(self._engine, self._stage, optimizer, pieces, self._whole, self._refresh_copies)
        self._description = {**self._description, "engine": f"deepspeed {deepspeed.__version__}, ZeRO-{self._stage}"}
        if parallel.offload == "optimizer":
            self._description["optimizer"] = "AdamW, DeepSpeedCPUAdam on the host"

    def _mark(self) -> None:
        """Tells DeepSpeed which parameters are cut and which are copies, and sums over the tensor ranks where each has
        part of a gradient: before it is added up, since ZeRO 2 and 3 send and drop it there."""
        for part in self._parameters:
            part.parameter.data.zero_()
            part.parameter.tensor_model_parallel = part.cut.dim is not None
            part.parameter.ds_pipe_replicated = part.copy
            if self._stage and part.cut.partial and not self._mesh.tensor.alone:
                part.parameter.register_hook(lambda gradient: sum_over(gradient.contiguous(), self._mesh.tensor))

    def _build_optimizer(self, deepspeed: Any, on_host: bool) -> torch.optim.Optimizer:
        parameters = {f"{part.name}{' (copy)' * part.copy}": part.parameter for part in self._parameters}
        if not on_host:
            return build_optimizer(parameters, self._section)
        groups = parameter_groups(parameters.items(), self._section.weight_decay)
        with _quiet():
            try:
                return deepspeed.ops.adam.DeepSpeedCPUAdam(
                    groups, lr=0.0, betas=self._section.betas, eps=self._section.eps
                )
            except (RuntimeError, OSError) as error:
                raise UnavailableError(
                    f'parallel.offload "optimizer" needs DeepSpeed\'s CPU Adam, which could not be built: '
                    f"{_causes(error)}; install ninja and a C++ compiler that torch accepts, or set "
                    'parallel.offload = "none"'
                ) from error

    def _bounded_norm(self, deepspeed: Any) -> BoundedNorm:
        return BoundedNorm(self._engine.optimizer, deepspeed.runtime.utils.get_global_norm_of_tensors)

    def _piece(self, part: LocalParameter) -> Piece:
        replica = part.copy or (self._stage == 0 and self._ranks.data.rank != 0)
        owned = not replica and (part.cut.dim is not None or self._mesh.tensor.rank == 0)
        run = partial(run_of, part.parameter, self._inner.state)
        return Piece(part.name, part.shape, part.cut, self._mesh.tensor, owned, run)

    def _refresh_copies(self) -> None:
        for master in self._masters:
            master.refresh()

    def launch_step(self, microbatches: Sequence[MicrobatchLike], lr: float, bounds: Bounds | None = None) -> DoneStep:
        """One update from the mean loss over the valid targets of all microbatches of all data ranks."""
        valid = valid_targets(self._mesh, [m.targets for m in microbatches])
        if valid == 0:
            return self._nothing_to_learn(microbatches)
        for group in self._inner.param_groups:
            group["lr"] = lr
        losses = self._forward_backward([self._place(m) for m in microbatches], self._ranks.data.size / valid)
        by_source = self._gather(microbatches, losses).by_source()
        loss = sum(total for total, _ in by_source.values()) / valid
        if self._pipeline is not None:
            self._finish_pipeline(loss)
        bounds = bounds or Bounds()
        grad_norm, dropped = self._update(loss, bounds) if self._norm else self._update_masters(loss, bounds)
        done = step_result(loss, by_source, grad_norm, valid, bounds, dropped)
        self._state.began |= done.updated
        return DoneStep(done)

    def _forward_backward(self, placed: Sequence[Rows], scale: float) -> Tensor | None:
        """Gradients of scale x the losses; each row's sum of losses, where the head is held.

        DeepSpeed divides by the number of data ranks, which the scale makes up for. A loss that is not finite spreads
        into every gradient: DeepSpeed, which looks at gradients only, then drops the step on all ranks.
        """
        if self._pipeline is not None:
            self._engine.set_gradient_accumulation_boundary(False)
            losses = self._pipeline.train(Rows.joined(placed), len(placed), scale)
            self._collect()
            return losses
        parts = []
        for number, rows in enumerate(placed):
            self._engine.set_gradient_accumulation_boundary(number == len(placed) - 1)
            total, losses = self._run(rows, scale)
            spread = total.sum() * torch.where(torch.isfinite(total.detach().sum()), 1.0, torch.nan)
            if self._masters:
                spread.backward()
                self._collect()
            else:
                self._engine.backward(spread, scale_wrt_gas=False)
            parts.append(losses)
        return torch.cat(parts)

    def _collect(self) -> None:
        for master in self._masters:
            master.collect()

    def _finish_pipeline(self, loss: float) -> None:
        """What DeepSpeed does at the end of its own backward passes, and the sum of a tied weight's two gradients."""
        self._engine.set_gradient_accumulation_boundary(True)
        for part in self._parameters:
            gradient = part.gradient()
            if part.name == "embedding.weight" and part.tied:
                sum_over_ends(gradient, self._mesh.pipeline)
            if not math.isfinite(loss):
                gradient.fill_(torch.nan)
        if self._stage:
            self._engine.allreduce_gradients()

    def _update(self, loss: float, bounds: Bounds) -> tuple[float, bool]:
        """DeepSpeed's update, or its dropping of the step; the norm before clipping, infinite where it is not finite,
        and whether the step was dropped as a spike."""
        assert self._norm is not None
        self._norm.at_most(-math.inf if loss > bounds.loss else bounds.grad_norm)
        self._engine.step()
        if not self._engine.was_step_applied():
            self._state.after_dropped_step()
        if self._norm.hidden is not None:
            return self._norm.hidden, True
        return float(self._engine.get_global_grad_norm()), False

    def _update_masters(self, loss: float, bounds: Bounds) -> tuple[float, bool]:
        """ZeRO 0: sum, norm, clip, update."""
        for part in self._parameters:
            if part.cut.partial:
                sum_over(part.gradient(), self._mesh.tensor)
        self._engine.allreduce_gradients()
        gradients = [part.gradient() for part in self._parameters]
        first = self._mesh.tensor.rank == 0
        counted = [p.gradient() for p in self._parameters if not p.copy and (first or p.cut.dim is not None)]
        grad_norm = math.sqrt(float(sum_of_squares(counted, self._ranks.model, self._mesh.device)))
        bound = self._section.clip_grad_norm
        if 0 < bound < grad_norm < math.inf:
            torch._foreach_mul_(gradients, bound / grad_norm)
        spike = bool(beyond(loss, grad_norm, bounds))
        if not (not_finite(loss, grad_norm) or spike):
            self._engine.step()
            self._refresh_copies()
        for master in self._masters:
            master.drop_gradients()
        return grad_norm, spike

    def _computing(self) -> Sequence[nn.Module]:
        return self._modules

    def _looked(self) -> None:
        """Nothing to put back."""

    def model_state(self) -> TensorShards:
        """Float32 masters, each rank's runs as boxes."""
        return self._state.model_state()

    def load_model_state(self, source: TensorSource) -> None:
        """Copies weights in; nothing is changed where anything does not fit."""
        self._state.load_model_state(source)

    def optimizer_state(self) -> TensorShards:
        """Flat, by "<parameter>/<key>"."""
        return self._state.optimizer_state()

    def load_optimizer_state(self, source: TensorSource) -> None:
        """Takes over copies; a source without names resets."""
        self._state.load_optimizer_state(source)

    def reset_optimizer(self) -> None:
        """Zeroes moments and steps."""
        self._state.reset_optimizer()


def _deepspeed() -> Any:
    """The package, quiet, and without the one thing that it would compile for each run on CPUs."""
    with _quiet():
        try:
            import deepspeed
            import deepspeed.ops.adam
        except ImportError as error:
            raise UnavailableError(
                f'parallel.engine "deepspeed" needs the deepspeed package, which cannot be imported ({error}): '
                'pip install -r requirements/run.txt, or set parallel.engine = "torch"'
            ) from None
    # On CPUs it would compile a shared-memory all-reduce at every first start, for inference, which nothing here uses.
    deepspeed.ops.__compatible_ops__ = {}
    # torch 2.13 has new names for two collectives, and says so at each place where DeepSpeed uses the old ones.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    for handler in logging.getLogger("DeepSpeed").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)  # standard output is ours
    return deepspeed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back the notes and warnings of imports and builds, logged or printed; errors are raised."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _causes(error: BaseException) -> str:
    """The first lines of an error and of what caused it."""
    found: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        found.append((str(cause).strip() or type(cause).__name__).splitlines()[0])
        cause = cause.__cause__
    return ": ".join(found)


def _open_alone(mesh: Mesh) -> None:
    """DeepSpeed wants a process group even for one process: one in memory, without a port."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if mesh.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
