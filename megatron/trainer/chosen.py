"""What rank 0 measures at step 0 and all ranks keep for the whole run: precision, and kernels (law T2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from megatron.checkpoint.manager import CheckpointRef
from megatron.config.errors import UnavailableError
from megatron.config.kernel_checks import check_kernels, compiling_obstacle
from megatron.config.layout_sizes import gathers_keys
from megatron.config.model_shape import ModelShape
from megatron.config.schema import KernelsSection, RunConfig
from megatron.engines.base import KernelChoice, PrecisionChoice
from megatron.engines.kernel_choice import choose_kernels, product_for
from megatron.engines.kernel_obstacles import obstacles
from megatron.engines.precision import COMPUTE_DTYPES, bf16_support, choose_precision
from megatron.kernels.attention_choice import attention_call
from megatron.kernels.choice import Kernels
from megatron.parallel.mesh import local_device
from megatron.trainer.job import Job


@dataclass(frozen=True)
class Chosen:
    """Both choices, with their reasons."""

    precision: PrecisionChoice
    kernels: KernelChoice


def choose(config: RunConfig, shape: ModelShape, found: CheckpointRef | None, job: Job) -> Chosen:
    """The choices of a new run, or those that its checkpoint kept; the same on all ranks."""
    precision = _precision(config, shape, found, job)
    return Chosen(precision, _kernels(config, shape, precision.name, found, job))


def _precision(config: RunConfig, shape: ModelShape, found: CheckpointRef | None, job: Job) -> PrecisionChoice:
    asked = config.train.precision
    if found and asked in ("auto", found.state["precision"]["name"]):
        return PrecisionChoice(**found.state["precision"])

    def choose_here() -> dict[str, Any]:
        rows = config.train.micro_batch_size, config.model.seq_length
        # float32 is timed as it would run
        product, _ = product_for(config.kernels, shape, torch.float32, rows)
        return asdict(choose_precision(asked, shape, *rows, kernels=Kernels(product=product)))

    choice = PrecisionChoice(**job.share("precision", choose_here))
    if choice.name == "bf16" and (obstacle := bf16_support(local_device(job.who.local_rank))):
        raise UnavailableError(f"train.precision is bf16 and cannot run on every process: {obstacle}; set it to fp32")
    return choice


def _kernels(
    config: RunConfig, shape: ModelShape, precision: str, found: CheckpointRef | None, job: Job
) -> KernelChoice:
    section, parallel, device = config.kernels, config.parallel, local_device(job.who.local_rank)
    check_kernels(section, parallel, job.who.world_size, shape, config.train, precision)
    no_compiling, gathered = compiling_obstacle(parallel, shape), gathers_keys(parallel, shape)
    dtype = COMPUTE_DTYPES[precision]
    what = {"documents": shape.document_mask, "gathered": gathered, "windowed": shape.window_bites()}
    call = attention_call(device, dtype, shape.head_dim, **what)
    kept = KernelChoice(**found.state["kernels"]) if found and "kernels" in found.state else None

    def choose_here() -> dict[str, Any]:
        obstacle = None
        wanted = kept if kept and _is_asked_for(section, kept.kernels) else None
        if wanted and not (obstacle := next(obstacles(wanted.kernels, call, no_compiling), None)):
            return asdict(wanted)
        rows = config.train.micro_batch_size, config.model.seq_length
        choice = choose_kernels(section, shape, dtype, rows, no_compiling, gathered, device)
        if obstacle:
            choice = replace(choice, reason=f"{choice.reason}; what the checkpoint kept is left: {obstacle}")
        return asdict(choice)

    # Rank 0 decides, whatever the others could run, so that nobody waits for a decision that is not made.
    choice = KernelChoice(**job.share("kernels", choose_here))
    for found_here in obstacles(choice.kernels, call, no_compiling):
        raise UnavailableError(
            f"the kernels that rank 0 chose cannot run on every process: {found_here}; give every process the same "
            "machine, packages and environment, or set that key to what all can run"
        )
    return choice


def _is_asked_for(section: KernelsSection, names: Mapping[str, object]) -> bool:
    """Whether a choice made before, by operation, is what the config asks for now. One that was made before a key was
    there had what the key's default stands for."""
    defaults = KernelsSection().model_dump()
    asked = {key: value for key, value in section.model_dump().items() if value != "auto"}
    compiled = asked.pop("compile", None)
    wanted = all(names.get(key, defaults[key]) == value for key, value in asked.items())
    return wanted and compiled in (None, "layers" if names.get("compile_layers") else "none")
