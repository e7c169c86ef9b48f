"""Which engine a config asks for. What cannot run here is refused, by key."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from megatron.checkpoint.tensor_shards import TensorSource
from megatron.config.errors import UnavailableError
from megatron.config.kernel_checks import splits_backward
from megatron.config.layout import resolve_layout
from megatron.config.model_shape import ModelShape
from megatron.config.schema import OptimizerSection, ParallelSection, TrainSection
from megatron.engines.base import Engine
from megatron.engines.host_memory import keep_freed_memory
from megatron.engines.master_weights import MasterWeights
from megatron.engines.model_parts import InitialWeights, ModelParts, build_parts, build_pipeline, whole_parameters
from megatron.engines.precision import COMPUTE_DTYPES
from megatron.engines.sharded_weights import ShardedWeights
from megatron.engines.torch_engine import TorchEngine, Weights
from megatron.kernels.choice import Kernels
from megatron.models.compiled_layers import compile_layers
from megatron.models.decoder import Decoder
from megatron.models.recompute import apply_recompute
from megatron.optim.build import describe_optimizer, keeps_high_halves
from megatron.parallel.mesh import Mesh, one_process_mesh

OBJECTIVES = ("z_loss", "label_smoothing")
"""Keys of [train] that say what is minimised beside cross-entropy."""
ATTENTION_WORDS = {
    "sdpa": "torch's SDPA",
    "blockwise": "block-wise GEMMs",
    "varlen": "torch's variable-length attention",
    "cudnn": "cuDNN's variable-length attention",
    "flex": "torch's FlexAttention",
    "unfused": "two products around a masked softmax",
}


def build_engine(
    shape: ModelShape,
    optimizer_section: OptimizerSection,
    parallel_section: ParallelSection,
    train_section: TrainSection,
    seed: int,
    precision: str,
    mesh: Mesh | None = None,
    weights: TensorSource | None = None,
    kernels: Kernels | None = None,
) -> Engine:
    """An engine with the given weights, or with initial ones from `seed`, the same at every layout.

    precision: a resolved name, from `choose_precision` or from the checkpoint that is resumed: fp64, fp32 or bf16.
    mesh: this process's place; one process where absent. kernels: from `choose_kernels`; the definitions where absent.
    Raises ConfigError where [parallel] asks for other ranks than there are, UnavailableError for what cannot run here.
    """
    mesh = mesh or one_process_mesh()
    if mesh.layout != resolve_layout(parallel_section, mesh.world_size):
        raise ValueError(f"the mesh is {mesh.layout}, [parallel] asks for another")
    _refuse_what_this_torch_cannot(parallel_section)
    if precision not in COMPUTE_DTYPES:
        raise ValueError(f"precision {precision!r} is not resolved: give choose_precision's name")
    kernels = kernels or default_kernels(mesh.device)
    master = torch.float64 if precision == "fp64" else torch.float32
    objective = {name: value for name in OBJECTIVES if (value := getattr(train_section, name))}
    parts = build_parts(shape, parallel_section, mesh, kernels, master, seed, objective)
    description = _describe(
        parts, optimizer_section, parallel_section, precision, mesh, kernels, train_section.gradients
    )
    engine: Engine
    if parallel_section.engine == "deepspeed":
        from megatron.engines.deepspeed_engine import build_deepspeed_engine

        engine = build_deepspeed_engine(
            parts, mesh, optimizer_section, parallel_section, precision, description, train_section
        )
    else:
        narrow = train_section.gradients == "bf16"
        engine = _torch_engine(shape, parts, optimizer_section, parallel_section, precision, mesh, description, narrow)
    engine.load_model_state(weights or InitialWeights(shape, seed))
    return engine


def _torch_engine(
    shape: ModelShape,
    parts: ModelParts,
    optimizer: OptimizerSection,
    parallel: ParallelSection,
    precision: str,
    mesh: Mesh,
    description: Mapping[str, str],
    narrow_gradients: bool,
) -> TorchEngine:
    dtype = COMPUTE_DTYPES[precision]
    recompute = parallel.recompute, parallel.recompute_policy, parallel.recompute_layers
    weights: Weights
    if mesh.world_size == 1:
        (model,) = parts.modules
        split = optimizer.master_weights == "split"
        model = (model.to(dtype) if split else model).to_empty(device=mesh.device)
        weights = MasterWeights(model, dtype, narrow_gradients, split, keeps_high_halves(optimizer))
        _prepare(weights.modules[0], recompute)  # bf16 runs in a copy of the masters' model
    else:
        for module in parts.modules:
            _prepare(module, recompute)  # FSDP2 wraps what is there
        weights = ShardedWeights(parts.modules, mesh, parallel.data_shard, dtype)
    pipeline = build_pipeline(parts, weights.modules, parallel, mesh, dtype)
    engine = TorchEngine(weights, optimizer, mesh, whole_parameters(shape), description, pipeline)
    if parts.modules[0].kernels.cuda_graphs:
        engine.use_graphs()
    return engine


def _refuse_what_this_torch_cannot(section: ParallelSection) -> None:
    """torch 2.11's split backward passes fail at autograd Functions written in Python; 2.13's do not."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if splits_backward(section) and version < (2, 13):
        raise UnavailableError(
            f"parallel.schedule = {section.schedule} needs torch 2.13 or newer, and this is {torch.__version__}: "
            "install it, or set parallel.schedule to 1f1b or interleaved"
        )


def default_kernels(device: torch.device) -> Kernels:
    """The definitions; attention by measurement (kernels/attention_blockwise.py has the figures)."""
    return Kernels(attention="blockwise" if device.type == "cpu" else "sdpa")


def _prepare(model: nn.Module, recompute: tuple[str, str, int | None]) -> None:
    """Compiles layers, then has them recomputed: what is kept and made again is then a compiled layer's input."""
    assert isinstance(model, Decoder)
    if model.kernels.compile_layers:
        compile_layers(model)
    apply_recompute(model, *recompute)


def _describe(
    parts: ModelParts,
    optimizer: OptimizerSection,
    parallel: ParallelSection,
    precision: str,
    mesh: Mesh,
    kernels: Kernels,
    gradients: str,
) -> dict[str, str]:
    words = {"engine": parallel.engine, "device": _device_words(mesh.device)}
    if mesh.world_size > 1:
        words["layout"] = f"{mesh.world_size} processes: {mesh.layout.words()}{' with sequence' * parallel.sequence}"
    if parallel.pipeline > 1:
        words["pipeline"] = f"{parallel.schedule}, layers by stage {[len(layers) for layers in parts.layers]}"
    if mesh.layout.data > 1:
        words["data shard"] = parallel.data_shard
    if parallel.context > 1:
        words["context"] = parts.modules[0].context_words
    if parallel.recompute != "none":
        words["recompute"] = parallel.recompute
    return words | {
        "precision": {"bf16": f"bf16, fp32 master weights, {gradients} gradients"}.get(precision, precision),
        "attention": ATTENTION_WORDS[kernels.attention],
        "kernels": kernels.words(),
        "optimizer": describe_optimizer(optimizer),
        "memory": keep_freed_memory() if mesh.device.type == "cpu" else "torch's caching allocator",
        "torch": torch.__version__,
    }


def _device_words(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
