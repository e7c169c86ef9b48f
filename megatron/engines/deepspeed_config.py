"""DeepSpeed's configuration from ours, with the user's own DeepSpeed JSON for DeepSpeed's own knobs.

Whatever a section of ours decides is decided there, once: the same key in the JSON may repeat it or say "auto", and
anything else is refused by name, since DeepSpeed itself would take either without a word.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron.config.errors import ConfigError
from megatron.config.schema import OptimizerSection, ParallelSection, TrainSection

ZERO_STAGES = {"none": 0, "optimizer": 1, "gradients": 2, "full": 3}
"""ZeRO stage by parallel.data_shard."""

MICROBATCHES = 2
"""What DeepSpeed is told of gradient accumulation. It only asks whether there is more than one microbatch: the engine
says itself which one is the step's last, since their number may change during a run."""

_LARGEST_BUCKET = 500_000_000
_SECTIONS = ("comms_logger", "flops_profiler", "aio", "tensorboard", "wandb", "csv_monitor", "comet", "timers")
_KNOBS: dict[str, type] = {
    "steps_per_print": int,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "dump_state": bool,
    "zero_optimization.allgather_bucket_size": int,
    "zero_optimization.allgather_partitions": bool,
    "zero_optimization.contiguous_gradients": bool,
    "zero_optimization.log_trace_cache_warnings": bool,
    "zero_optimization.overlap_comm": bool,
    "zero_optimization.reduce_bucket_size": int,
    "zero_optimization.reduce_scatter": bool,
    "zero_optimization.stage3_max_live_parameters": int,
    "zero_optimization.stage3_max_reuse_distance": int,
    "zero_optimization.stage3_model_persistence_threshold": int,
    "zero_optimization.stage3_module_granularity_threshold": int,
    "zero_optimization.stage3_param_persistence_threshold": int,
    "zero_optimization.stage3_prefetch_bucket_size": int,
    "zero_optimization.sub_group_size": int,
    "zero_optimization.use_multi_rank_bucket_allreduce": bool,
    "zero_optimization.offload_optimizer.pin_memory": bool,
}
_WORDS: dict[type, str] = {bool: "true or false", int: "a whole number"}


def refuse_what_deepspeed_cannot(parallel: ParallelSection, optimizer: OptimizerSection, precision: str) -> None:
    """Raises ConfigError for choices that only the torch engine carries out, and for contradictions."""
    other = 'set parallel.engine = "torch"'
    if precision == "fp64":
        raise ConfigError(f"train.precision fp64 cannot run on DeepSpeed, which keeps float32 masters: {other}")
    if optimizer.name == "muon":
        raise ConfigError(f'optimizer.name "muon" is not available with DeepSpeed: {other}, or use "adamw"')
    if optimizer.implementation != "torch":
        raise ConfigError(
            f'optimizer.implementation "{optimizer.implementation}" is not available with DeepSpeed: {other}'
        )
    if parallel.data_shard != "none" and parallel.data_replicate > 1:
        raise ConfigError(
            f"parallel.data_replicate {parallel.data_replicate} is not available with DeepSpeed, which cuts over all "
            f"data ranks: set it to 1, or {other}"
        )
    if parallel.pipeline > 1 and ZERO_STAGES[parallel.data_shard] > 1:
        raise ConfigError(
            f'parallel.data_shard "{parallel.data_shard}" does not work with parallel.pipeline {parallel.pipeline} on '
            f'DeepSpeed: set data_shard to "optimizer" or "none", or {other}'
        )
    if parallel.pipeline > 1 and parallel.schedule in ("zero-bubble", "zbv"):
        raise ConfigError(
            f'parallel.schedule "{parallel.schedule}" does not work with DeepSpeed: use "1f1b" or "interleaved", or '
            f"{other}"
        )
    if parallel.offload == "optimizer" and parallel.data_shard == "none":
        raise ConfigError(
            'parallel.offload "optimizer" needs parallel.data_shard "optimizer", "gradients" or "full": DeepSpeed '
            "offloads what ZeRO cuts (one rank is enough)"
        )
    if parallel.offload == "optimizer" and optimizer.name != "adamw":
        raise ConfigError(
            f'parallel.offload "optimizer" runs adamw on the host, and optimizer.name is "{optimizer.name}": set '
            'parallel.offload = "none"'
        )


def deepspeed_config(
    parallel: ParallelSection,
    optimizer: OptimizerSection,
    precision: str,
    parameters: int,
    train: TrainSection | None = None,
) -> dict[str, Any]:
    """What deepspeed.initialize is given: ours, and the knobs of `parallel.deepspeed_config`.

    parameters: how many this rank holds, which bounds the buffer that gradients are sent from.
    train: where given, the batch sizes in the user's JSON may repeat its.
    Raises ConfigError for a file that cannot be read, contradicts ours or has keys that are not taken.
    """
    stage = ZERO_STAGES[parallel.data_shard]
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": max(1, min(_LARGEST_BUCKET, parameters))}
    if parallel.offload == "optimizer":
        zero["offload_optimizer"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICROBATCHES,
        # Without ZeRO the engine clips itself: DeepSpeed would not tell the norm.
        "gradient_clipping": optimizer.clip_grad_norm if stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",
    }
    if precision == "bf16" and stage:
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        if parallel.pipeline > 1:
            # Else the microbatches of a pipeline would be added up in bfloat16.
            config["bf16"]["immediate_grad_update"] = True
    if parallel.deepspeed_config is not None:
        _take_knobs(config, parallel.deepspeed_config, _decided(parallel, optimizer, precision, train))
    return config


def _decided(
    parallel: ParallelSection, optimizer: OptimizerSection, precision: str, train: TrainSection | None
) -> dict[str, tuple[Any, str]]:
    """DeepSpeed's key -> (the value that it may repeat, None where there is none; the key of ours that decides)."""
    adamw = optimizer.name == "adamw"
    return {
        "train_batch_size": (train and train.global_batch_size, "train.global_batch_size"),
        "train_micro_batch_size_per_gpu": (train and train.micro_batch_size, "train.micro_batch_size"),
        "gradient_accumulation_steps": (None, "train.global_batch_size"),
        "gradient_clipping": (optimizer.clip_grad_norm, "optimizer.clip_grad_norm"),
        "gradient_allreduce_op": ("mean", "the engine"),
        "communication_data_type": ("fp32", "train.precision"),
        "data_types.grad_accum_dtype": ("fp32", "train.precision"),
        "fp16.enabled": (False, "train.precision"),
        "bf16.enabled": (precision == "bf16", "train.precision"),
        "bfloat16.enabled": (precision == "bf16", "train.precision"),
        "optimizer.type": ("AdamW" if adamw else "SGD", "optimizer.name"),
        "optimizer.params.lr": (None, "lr of [[stages]]"),
        "optimizer.params.betas": (list(optimizer.betas) if adamw else None, "optimizer.betas"),
        "optimizer.params.eps": (optimizer.eps if adamw else None, "optimizer.eps"),
        "optimizer.params.weight_decay": (optimizer.weight_decay, "optimizer.weight_decay"),
        "optimizer.params.momentum": (None if adamw else optimizer.momentum, "optimizer.momentum"),
        "scheduler": (None, "lr of [[stages]]"),
        "activation_checkpointing": (None, "parallel.recompute"),
        "tensor_parallel": (None, "parallel.tensor"),
        "pipeline": (None, "parallel.pipeline"),
        "sequence_parallel_size": (None, "parallel.context"),
        "zero_allow_untested_optimizer": (True, "optimizer.name"),
        "zero_optimization.stage": (ZERO_STAGES[parallel.data_shard], "parallel.data_shard"),
        "zero_optimization.offload_optimizer.device": (
            "cpu" if parallel.offload == "optimizer" else "none",
            "parallel.offload",
        ),
    }


def _take_knobs(config: dict[str, Any], path: str, decided: Mapping[str, tuple[Any, str]]) -> None:
    where = f"parallel.deepspeed_config {path}"
    for key, value in _leaves(_read(path, where)):
        if value == "auto":
            continue
        if key.startswith("fp16.") and key != "fp16.enabled":
            continue  # details of something that is off
        owner = next((name for name in decided if key == name or key.startswith(f"{name}.")), None)
        if owner is not None:
            allowed, ours = decided[owner]
            if allowed is None or value != allowed or isinstance(value, bool) != isinstance(allowed, bool):
                said = "" if allowed is None else f", and says {json.dumps(allowed)}"
                raise ConfigError(
                    f"{where}: {key} is {json.dumps(value)}, but {ours} decides it{said}: "
                    f'leave {key} out, or set it to "auto"'
                )
            continue
        if key.split(".")[0] not in _SECTIONS:
            _check_knob(where, key, value, decided)
        _put(config, key, value)


def _check_knob(where: str, key: str, value: object, decided: Mapping[str, object]) -> None:
    if key not in _KNOBS:
        near = difflib.get_close_matches(key, [*_KNOBS, *decided, *_SECTIONS], 1)
        hint = f"did you mean {near[0]}? Else leave it out" if near else "leave it out"
        raise ConfigError(f"{where}: {key} is not a knob that the deepspeed engine takes: {hint}")
    wanted = _KNOBS[key]
    whole = isinstance(value, float) and value.is_integer()  # 5e8 is written so in DeepSpeed's own examples
    if not (isinstance(value, wanted) or (wanted is int and whole)) or (wanted is int and isinstance(value, bool)):
        raise ConfigError(f"{where}: {key} is {json.dumps(value)}, {_WORDS[wanted]} is needed")


def _read(path: str, where: str) -> dict[str, Any]:
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{where}: there is no such file: give the path of DeepSpeed's JSON") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: is not UTF-8 at byte {error.start}: save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{where}: line {error.lineno}, column {error.colno}: {error.msg}: correct the JSON"
        ) from None
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read: {error.strerror}") from None
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: holds {type(given).__name__}, an object {{…}} is needed")
    return given


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _put(config: dict[str, Any], key: str, value: object) -> None:
    *sections, last = key.split(".")
    for section in sections:
        config = config.setdefault(section, {})
    config[last] = int(value) if isinstance(value, float) and value.is_integer() else value
