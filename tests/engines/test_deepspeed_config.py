"""DeepSpeed's own JSON: its knobs pass, what ours decides does not, and every refusal says file, key and remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.config.errors import ConfigError
from megatron.config.schema import OptimizerSection, ParallelSection, TrainSection
from megatron.engines.deepspeed_config import deepspeed_config, refuse_what_deepspeed_cannot

TRAIN = TrainSection(global_batch_size=32, micro_batch_size=4)


def config(path: Path | None, optimizer: OptimizerSection | None = None, **parallel: Any) -> dict[str, Any]:
    section = ParallelSection(
        engine="deepspeed",
        data_shard=parallel.pop("data_shard", "gradients"),
        deepspeed_config=None if path is None else str(path),
        **parallel,
    )
    return deepspeed_config(section, optimizer or OptimizerSection(), "bf16", 1000, TRAIN)


def written(folder: Path, content: object) -> Path:
    path = folder / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_knobs_pass_and_what_repeats_ours_is_taken(tmp_path: Path) -> None:
    given = {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 1,
        "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "scheduler": {"type": "auto", "params": {"warmup_num_steps": "auto"}},
        "zero_optimization": {
            "stage": 2,
            "overlap_comm": True,
            "reduce_bucket_size": 5e8,
            "offload_optimizer": {"device": "none", "pin_memory": True},
        },
        "comms_logger": {"enabled": True, "verbose": False},
        "aio": {"block_size": 1048576},
        "steps_per_print": 100,
        "wall_clock_breakdown": False,
    }
    made, plain = config(written(tmp_path, given)), config(None)
    assert made["zero_optimization"].pop("overlap_comm") is True
    assert made["zero_optimization"].pop("reduce_bucket_size") == 500_000_000
    assert made["zero_optimization"].pop("offload_optimizer") == {"pin_memory": True}
    assert made.pop("comms_logger") == {"enabled": True, "verbose": False} and made.pop("aio")
    assert made.pop("steps_per_print") == 100 and made.pop("wall_clock_breakdown") is False
    assert plain["zero_optimization"].pop("reduce_bucket_size") == 1000  # no buffer beyond the model's size
    assert made == plain


@pytest.mark.parametrize(
    ("given", "key", "ours"),
    [
        (
            {"zero_optimization": {"stage": 3}},
            "zero_optimization.stage is 3",
            "parallel.data_shard decides it, and says 2",
        ),
        ({"train_batch_size": 64}, "train_batch_size is 64", "train.global_batch_size decides it, and says 32"),
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu is 8", "train.micro_batch_size"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2", "train.global_batch_size"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5", "optimizer.clip_grad_norm decides it, and says 1.0"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is true", "train.precision"),
        ({"bf16": {"enabled": False}}, "bf16.enabled is false", "train.precision"),
        ({"optimizer": {"type": "Lamb"}}, 'optimizer.type is "Lamb"', "optimizer.name"),
        ({"optimizer": {"params": {"lr": 0.001}}}, "optimizer.params.lr is 0.001", "lr of [[stages]]"),
        ({"optimizer": {"params": {"betas": [0.9, 0.999]}}}, "optimizer.params.betas", "optimizer.betas"),
        ({"optimizer": {"params": {"weight_decay": 0.0}}}, "optimizer.params.weight_decay", "optimizer.weight_decay"),
        ({"scheduler": {"type": "WarmupLR"}}, 'scheduler.type is "WarmupLR"', "lr of [[stages]]"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            'zero_optimization.offload_optimizer.device is "cpu"',
            'parallel.offload decides it, and says "none"',
        ),
        ({"communication_data_type": "fp16"}, "communication_data_type", "train.precision"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op", "the engine"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "activation_checkpointing", "parallel.recompute"),
    ],
)
def test_B1_what_ours_decides_is_refused_by_both_names(tmp_path: Path, given: object, key: str, ours: str) -> None:
    path = written(tmp_path, given)
    with pytest.raises(ConfigError) as refusal:
        config(path)
    assert all(words in str(refusal.value) for words in (str(path), key, ours, '"auto"'))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{\n  'stage': 2}", "line 2, column 3"),
        ("[1]", "holds list, an object"),
        ({"zero_optimization": {"overlap_com": True}}, "did you mean zero_optimization.overlap_comm"),
        ({"zero_optimization": {"overlap_comm": "yes"}}, 'overlap_comm is "yes", true or false is needed'),
        ({"zero_optimization": {"reduce_bucket_size": 1.5}}, "reduce_bucket_size is 1.5, a whole number is needed"),
        ({"zero_optimization": {"reduce_bucket_size": True}}, "a whole number is needed"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "is not a knob"),
    ],
)
def test_B1_a_file_that_cannot_be_used_is_named(tmp_path: Path, content: object, words: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(ConfigError) as refusal:
        config(path)
    assert str(path) in str(refusal.value) and words in str(refusal.value)


def test_B1_a_file_that_is_not_there_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.json: there is no such file"):
        config(tmp_path / "missing.json")
    (tmp_path / "ds.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ConfigError, match="not UTF-8 at byte 7"):
        config(tmp_path / "ds.json")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        config(tmp_path)


@pytest.mark.parametrize(
    ("parallel", "optimizer", "precision", "error", "words"),
    [
        ({}, {}, "fp64", ConfigError, "train.precision fp64"),
        ({}, {"name": "muon"}, "bf16", ConfigError, 'optimizer.name "muon"'),
        ({}, {"implementation": "apex"}, "bf16", ConfigError, "optimizer.implementation"),
        ({"data_shard": "full", "data_replicate": 2}, {}, "bf16", ConfigError, "parallel.data_replicate 2"),
        ({"data_shard": "gradients", "pipeline": 2}, {}, "bf16", ConfigError, 'parallel.data_shard "gradients"'),
        ({"pipeline": 2, "schedule": "zbv"}, {}, "bf16", ConfigError, 'parallel.schedule "zbv"'),
        ({"offload": "optimizer"}, {}, "bf16", ConfigError, "needs parallel.data_shard"),
        ({"offload": "optimizer", "data_shard": "full"}, {"name": "sgd"}, "bf16", ConfigError, "runs adamw"),
    ],
)
def test_T3_what_deepspeed_cannot_do_is_refused_by_key(
    parallel: Any, optimizer: Any, precision: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as refusal:
        refuse_what_deepspeed_cannot(
            ParallelSection(engine="deepspeed", **parallel), OptimizerSection(**optimizer), precision
        )
    assert "set " in str(refusal.value) or "needs" in str(refusal.value)
