"""Which engine a config asks for. What cannot run yet is refused here, by key."""

from __future__ import annotations

import torch

from megatron.config.errors import UnavailableError
from megatron.config.model_shape import ModelShape
from megatron.config.schema import OptimizerSection, ParallelSection, TrainSection
from megatron.engines.base import Engine
from megatron.engines.host_memory import keep_freed_memory
from megatron.engines.precision import COMPUTE_DTYPES
from megatron.engines.torch_engine import TorchEngine
from megatron.models.attention import AttentionBackend
from megatron.models.decoder import Decoder
from megatron.models.initialise import initialise
from megatron.parallel.mesh import Mesh, one_process_mesh


def build_engine(
    shape: ModelShape,
    optimizer_section: OptimizerSection,
    parallel_section: ParallelSection,
    train_section: TrainSection,
    seed: int,
    precision: str,
    mesh: Mesh | None = None,
) -> Engine:
    """An engine with initial weights from `seed`.

    precision: a resolved name, from `choose_precision` or from the checkpoint that is resumed: fp64, fp32 or bf16.
    mesh: this process's place; read from the environment where absent.
    Raises UnavailableError for every [parallel] key that asks for what one process cannot do.
    """
    _refuse_what_is_not_there(parallel_section)
    if precision not in COMPUTE_DTYPES:
        raise ValueError(f"precision {precision!r} is not resolved: give choose_precision's name")
    mesh = mesh or one_process_mesh()
    backend = attention_backend(mesh.device)
    model = _initial_model(shape, seed, precision, mesh.device, backend)
    description = {
        "engine": "torch",
        "device": _device_words(mesh.device),
        "precision": {"bf16": "bf16, fp32 master weights"}.get(precision, precision),
        "attention": {"sdpa": "torch's SDPA", "blockwise": "block-wise GEMMs"}[backend],
        "optimizer": {"adamw": "AdamW, torch's fused kernel", "sgd": "SGD"}[optimizer_section.name],
        "memory": keep_freed_memory() if mesh.device.type == "cpu" else "torch's caching allocator",
        "torch": torch.__version__,
    }
    return TorchEngine(model, optimizer_section, COMPUTE_DTYPES[precision], description)


def attention_backend(device: torch.device) -> AttentionBackend:
    """The attention that runs on a device, by measurement (kernels/attention_blockwise.py has the figures)."""
    return "blockwise" if device.type == "cpu" else "sdpa"


def _initial_model(
    shape: ModelShape, seed: int, precision: str, device: torch.device, backend: AttentionBackend
) -> Decoder:
    with torch.device("meta"):
        model = Decoder(shape, backend)
    master = torch.float64 if precision == "fp64" else torch.float32
    model = model.to(master).to_empty(device=device)
    initialise(model, seed)
    return model


def _device_words(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def _refuse_what_is_not_there(section: ParallelSection) -> None:
    allowed: dict[str, object] = {
        "engine": "torch",
        "tensor": 1,
        "sequence": False,
        "pipeline": 1,
        "context": 1,
        "schedule": "1f1b",
        "data_shard": "none",
        "recompute": "none",
    }
    for key, value in allowed.items():
        asked = getattr(section, key)
        if asked != value:
            words = str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')
            raise UnavailableError(
                f"parallel.{key} = {str(asked).lower()} is not available yet: this version trains on one process; "
                f"set parallel.{key} = {words} or leave it out"
            )
