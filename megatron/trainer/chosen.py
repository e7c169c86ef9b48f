"""What rank 0 measures at step 0 and all ranks keep for the whole run: precision, and kernels (law T2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from megatron.checkpoint.manager import CheckpointRef
from megatron.config.errors import ConfigError, UnavailableError
from megatron.config.model_shape import ModelShape
from megatron.config.schema import KernelsSection, RunConfig
from megatron.engines.base import KernelChoice, PrecisionChoice
from megatron.engines.graphed import WITHOUT_CHOICES
from megatron.engines.kernel_choice import (
    OPERATIONS,
    choose_kernels,
    gpu_obstacle,
    interpreted_obstacle,
    obstacle_of,
    product_for,
)
from megatron.engines.precision import COMPUTE_DTYPES, bf16_support, choose_precision
from megatron.kernels.attention_choice import AttentionCall, attention_call, attention_obstacle
from megatron.kernels.choice import Kernels
from megatron.kernels.matrix_product import onednn_obstacle
from megatron.models.compiled_layers import obstacle_to_compiling
from megatron.parallel.mesh import local_device
from megatron.parallel.pipeline import SPLIT_BACKWARD
from megatron.trainer.job import Job


@dataclass(frozen=True)
class Chosen:
    """Both choices, with their reasons."""

    precision: PrecisionChoice
    kernels: KernelChoice


def choose(config: RunConfig, shape: ModelShape, found: CheckpointRef | None, job: Job) -> Chosen:
    """The choices of a new run, or those that its checkpoint kept; the same on all ranks."""
    precision = _precision(config, shape, found, job)
    return Chosen(precision, _kernels(config, shape, COMPUTE_DTYPES[precision.name], found, job))


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
    config: RunConfig, shape: ModelShape, dtype: torch.dtype, found: CheckpointRef | None, job: Job
) -> KernelChoice:
    section, parallel, device = config.kernels, config.parallel, local_device(job.who.local_rank)
    split = parallel.pipeline > 1 and parallel.schedule in SPLIT_BACKWARD
    no_compiling = obstacle_to_compiling(split, parallel.recompute, parallel.recompute_policy, shape.hidden_dropout)
    if parallel.engine != "torch":
        no_compiling = f"parallel.engine = {parallel.engine} was never compared with compiled layers"
    _check_graphs(config, dtype, job.who.world_size)
    heads = max(1, shape.num_key_value_heads // parallel.tensor)
    gathered = parallel.context > 1 and (parallel.context_method == "gather" or heads % parallel.context > 0)
    call = attention_call(device, dtype, shape.head_dim, documents=shape.document_mask, gathered=gathered)
    if section.fp8 and job.who.world_size > 1:
        raise ConfigError(
            f"kernels.fp8 = true is for one process, and there are {job.who.world_size}: a tensor's one scale is that "
            "of what a process holds of it, so that the layout would change the loss curve; leave it out"
        )
    kept = KernelChoice(**found.state["kernels"]) if found and "kernels" in found.state else None

    def choose_here() -> dict[str, Any]:
        obstacle = None
        wanted = kept if kept and _is_asked_for(section, kept.kernels) else None
        if wanted and not (obstacle := _obstacle(wanted, call, no_compiling)):
            return asdict(wanted)
        rows = config.train.micro_batch_size, config.model.seq_length
        choice = choose_kernels(section, shape, dtype, rows, no_compiling, gathered, device)
        if obstacle:
            choice = replace(choice, reason=f"{choice.reason}; the checkpoint's cannot run here: {obstacle}")
        return asdict(choice)

    # Rank 0 decides, whatever the others could run, so that nobody waits for a decision that is not made.
    choice = KernelChoice(**job.share("kernels", choose_here))
    if obstacle := _obstacle(choice, call, no_compiling):
        raise UnavailableError(
            f"the kernels that rank 0 chose cannot run on every process: kernels.{obstacle}; give every process the "
            "same machine, packages and environment, or set that key to what all can run"
        )
    return choice


def _check_graphs(config: RunConfig, dtype: torch.dtype, processes: int) -> None:
    """CUDA graphs are for what runs alike every time on one process, and adds narrow gradients to wide ones."""
    section = config.kernels
    if not section.cuda_graphs:
        return
    asked = {
        f"{processes} processes": processes > 1,
        f"parallel.engine = {config.parallel.engine}": config.parallel.engine != "torch",
        "a precision other than bf16": dtype != torch.bfloat16,
        f"train.gradients = {config.train.gradients}": config.train.gradients != "fp32",
        f"kernels.attention = {section.attention}": section.attention not in ("auto", *WITHOUT_CHOICES),
    }
    if against := [words for words, found in asked.items() if found]:
        raise ConfigError(
            f"kernels.cuda_graphs = true does not go with {' and '.join(against)}: it is for one process of the torch "
            f"engine in bf16 with fp32 gradients and attention by {' or '.join(WITHOUT_CHOICES)}; leave it out"
        )


def _obstacle(choice: KernelChoice, call: AttentionCall, no_compiling: str | None) -> str | None:
    """Why kernels cannot run on this process, "<key> = <value>: <reason>"; None where they can."""
    names = choice.kernels
    for operation in OPERATIONS:
        if why := obstacle_of(names[operation], call.device):
            return f"{operation} = {names[operation]}: {why}"
    if why := attention_obstacle(names["attention"], call):
        return f"attention = {names['attention']}: {why}"
    if names.get("product") == "onednn" and (why := onednn_obstacle()):
        return f"product = onednn: {why}"
    for key in ("fp8", "cuda_graphs"):
        if names.get(key) and (why := gpu_obstacle(key, call.device)):
            return f"{key} = true: {why}"
    if names["compile_layers"]:
        why = no_compiling or interpreted_obstacle(names)
        return f"compile = layers: {why}" if why else None
    return None


def _is_asked_for(section: KernelsSection, names: Mapping[str, object]) -> bool:
    """Whether a choice made before, by operation, is what the config asks for now."""
    asked = {key: value for key, value in section.model_dump().items() if value != "auto"}
    compiled = asked.pop("compile", None)
    wanted = all(names.get(key) == value for key, value in asked.items())
    return wanted and compiled in (None, "layers" if names.get("compile_layers") else "none")
