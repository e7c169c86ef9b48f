"""What is refused of a layout before any process is started, and in which words."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.config.errors import EXIT_USAGE, ConfigError, StagemixError
from megatron.config.layout import resolve_layout
from megatron.config.layout_checks import BatchShape, check_layout, refusals
from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.schema import ModelSection, OptimizerSection, ParallelSection, TrainSection
from megatron.config.tested_layouts import TESTED, combination_of

MODEL = {"hidden_size": 96, "num_hidden_layers": 8, "num_attention_heads": 12, "num_key_value_heads": 4}
MODEL |= {"intermediate_size": 256}


def shape_of(vocabulary: int = 320, **over: Any) -> ModelShape:
    return resolve_model(ModelSection(seq_length=64, **(MODEL | over)), vocabulary)


def refused(
    parallel: dict[str, Any],
    processes: int | None = None,
    *,
    model: dict[str, Any] | None = None,
    batch: tuple[int, int] = (64, 16),
    micro: int = 1,
    optimizer: dict[str, Any] | None = None,
    precision: str = "fp32",
    train: dict[str, Any] | None = None,
) -> list[StagemixError]:
    section = ParallelSection.model_validate(parallel)
    least = section.pipeline * section.context * section.tensor * section.data_replicate
    layout = resolve_layout(section, processes or least)
    sizes = TrainSection.model_validate({"global_batch_size": batch[1], "micro_batch_size": micro} | (train or {}))
    return list(
        refusals(
            section,
            layout,
            shape_of(**(model or {})),
            sizes,
            OptimizerSection.model_validate(optimizer or {}),
            [BatchShape(*batch)],
            precision,
        )
    )


PP4 = {"pipeline": 4}
DEEPSPEED = {"engine": "deepspeed"}

# what is asked, what else is so, and words that the message must have
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "heads": (
        {"tensor": 8},
        {},
        ["num_attention_heads 12", "parallel.tensor 8 (12 = 8 x 1 + 4)", "one of 1, 2, 4,", "to 16"],
    ),
    "key-value heads": (
        {"tensor": 2},
        {"model": {"num_attention_heads": 12, "num_key_value_heads": 3}},
        ["num_key_value_heads 3 is not a multiple of parallel.tensor 2 (3 = 2 x 1 + 1)", "num_key_value_heads to 4"],
    ),
    "fewer key-value heads": (
        {"tensor": 6},
        {"model": {"intermediate_size": 192, "vocabulary": 384}},
        ["num_key_value_heads 4 is fewer than parallel.tensor 6", "(6 = 4 x 1 + 2)", "a divisor of 6"],
    ),
    "intermediate": (
        {"tensor": 4},
        {"model": {"intermediate_size": 258}},
        ["intermediate_size 258", "(258 = 4 x 64 + 2)", "intermediate_size to 256 or 260"],
    ),
    "vocabulary": (
        {"tensor": 3},
        {"model": {"num_key_value_heads": 12, "intermediate_size": 192}},
        ["the vocabulary of 320, padded to 320, is not a multiple of parallel.tensor 3", "model.vocab_size to 384"],
    ),
    "layers": (
        {"pipeline": 4},
        {"model": {"num_hidden_layers": 3}},
        [
            "parallel.pipeline 4 needs at least one layer",
            "num_hidden_layers is 3",
            "pipeline to 1 or 2,",
            "to 4 or more",
        ],
    ),
    "layers of virtual stages": (
        {"pipeline": 4, "schedule": "interleaved", "virtual": 3},
        {},
        [
            "parallel.pipeline 4 x 3 stages on a rank (parallel.schedule = interleaved) = 12 stages",
            "is 8",
            "pipeline to 2,",
        ],
    ),
    "layers of zbv": (
        {"pipeline": 4, "schedule": "zbv"},
        {"model": {"num_hidden_layers": 7}},
        ["4 x 2 stages on a rank (parallel.schedule = zbv) = 8 stages", "pipeline to 2,", "to 8 or more"],
    ),
    "batch": (
        {},
        {"processes": 2, "batch": (64, 30), "micro": 4},
        [
            "train.global_batch_size 30 is not a multiple of train.micro_batch_size 4 x 2 data ranks = 8",
            "(30 = 8 x 3 + 6)",
            "24 or 32",
        ],
    ),
    "small batch": ({}, {"processes": 4, "batch": (64, 2)}, ["1 x 4 data ranks = 4", "set it to 4 "]),
    "few microbatches": (
        PP4,
        {"processes": 8, "batch": (64, 4)},
        [
            "parallel.schedule = 1f1b cannot run 2 microbatches over parallel.pipeline 4",
            "4 / train.micro_batch_size 1 / 2 data ranks = 2",
            "to 8 ",
        ],
    ),
    "uneven rounds": (
        PP4 | {"schedule": "interleaved"},
        {"batch": (64, 22), "micro": 2},
        ["cannot run 11 microbatches over parallel.pipeline 4", "in equal rounds", "20 or 24"],
    ),
    "uneven rounds of zero-bubble": (
        PP4 | {"schedule": "zero-bubble"},
        {"batch": (64, 9)},
        ["parallel.schedule = zero-bubble cannot run 9 microbatches", "8 or 10"],
    ),
    "sequence of context": (
        {"context": 2},
        {"batch": (63, 16)},
        ["seq_length 63 cannot be cut equally over parallel.context 2", "(63 = 2 x 31 + 1)", "62 or 64"],
    ),
    "sequence of gathered context": (
        {"context": 8},
        {"batch": (72, 16), "model": {"num_key_value_heads": 4}},
        ["two chunks a context rank", "multiples of 16", "(72 = 16 x 4 + 8)", "64 or 80"],
    ),
    "sequence of tensor": (
        {"tensor": 4, "sequence": True},
        {"batch": (62, 16)},
        ["seq_length 62", "parallel.tensor 4 (parallel.sequence = true)", "(62 = 4 x 15 + 2)", "60 or 64"],
    ),
    "sequence of both": (
        {"tensor": 4, "sequence": True, "context": 2, "context_method": "gather"},
        {"batch": (68, 16)},
        ["parallel.context 2 x parallel.tensor 4", "multiples of 8", "64 or 72"],
    ),
    "all-to-all": (
        {"tensor": 2, "context": 4, "context_method": "all-to-all"},
        {},
        ["2 key-value heads on each tensor rank do not divide by parallel.context 4 (2 = 4 x 0 + 2)", "gather"],
    ),
    "sequence with tensor 1": (
        {"sequence": True},
        {},
        ["parallel.sequence = true", "parallel.tensor is 1"],
    ),
    "virtual": (
        PP4 | {"virtual": 4},
        {},
        ["parallel.virtual 4 has no effect on parallel.schedule = 1f1b", "interleaved"],
    ),
    "virtual of zbv": (
        PP4 | {"virtual": 1, "schedule": "zbv"},
        {},
        ["parallel.virtual 1", "zbv", "2 stages"],
    ),
    "virtual 1": (
        PP4 | {"virtual": 1, "schedule": "interleaved"},
        {},
        ["interleaves nothing", "parallel.schedule = 1f1b"],
    ),
    "interleaved alone": (
        {"schedule": "interleaved"},
        {},
        ["parallel.schedule = interleaved needs a pipeline"],
    ),
    "zero-bubble alone": (
        {"schedule": "zero-bubble"},
        {},
        ["parallel.schedule = zero-bubble needs a pipeline"],
    ),
    "zbv alone": (
        {"schedule": "zbv"},
        {},
        ["parallel.schedule = zbv needs a pipeline", "parallel.pipeline is 1"],
    ),
    "context method": (
        {"context_method": "gather"},
        {},
        ["parallel.context_method = gather needs context ranks"],
    ),
    "replicas of nothing": (
        {"data_replicate": 2},
        {},
        ["parallel.data_replicate 2", "parallel.data_shard is none"],
    ),
    "recompute layers": ({"recompute_layers": 2}, {}, ["parallel.recompute_layers 2 has no effect"]),
    "recompute policy": (
        {"recompute": "full", "recompute_policy": "operations"},
        {},
        ["parallel.recompute_policy = operations is for parallel.recompute = selective", "it is full"],
    ),
    "offload on torch": (
        {"offload": "optimizer"},
        {},
        ["parallel.offload = optimizer is DeepSpeed's", "parallel.engine = deepspeed"],
    ),
    "DeepSpeed's file on torch": (
        {"deepspeed_config": "ds.json"},
        {},
        ["deepspeed_config = 'ds.json' is DeepSpeed's"],
    ),
    "zero-bubble with full": (
        PP4 | {"schedule": "zero-bubble", "data_shard": "full"},
        {"processes": 8},
        ["parallel.schedule = zero-bubble with parallel.data_shard = full loses gradients"],
    ),
    "zbv with full": (
        PP4 | {"schedule": "zbv", "data_shard": "full"},
        {"processes": 8},
        ["parallel.schedule = zbv with parallel.data_shard = full loses gradients"],
    ),
    "ZeRO-2 with pipeline": (
        DEEPSPEED | PP4 | {"data_shard": "gradients"},
        {"processes": 8},
        ["parallel.data_shard = gradients (ZeRO-2) with parallel.pipeline 4 on DeepSpeed", "none or optimizer"],
    ),
    "ZeRO-3 with pipeline": (
        DEEPSPEED | PP4 | {"data_shard": "full"},
        {"processes": 8},
        ["parallel.data_shard = full (ZeRO-3)", "parallel.engine = torch"],
    ),
    "zero-bubble on DeepSpeed": (
        DEEPSPEED | PP4 | {"schedule": "zero-bubble"},
        {},
        ["parallel.schedule = zero-bubble", "DeepSpeed's hooks"],
    ),
    "zbv on DeepSpeed": (
        DEEPSPEED | PP4 | {"schedule": "zbv"},
        {},
        ["parallel.schedule = zbv", "DeepSpeed's hooks"],
    ),
    "replicas on DeepSpeed": (
        DEEPSPEED | {"data_replicate": 2, "data_shard": "full"},
        {"processes": 4},
        ["parallel.data_replicate 2 with parallel.engine = deepspeed"],
    ),
    "offload of ZeRO-0": (
        DEEPSPEED | {"offload": "optimizer"},
        {},
        ["parallel.data_shard is none (ZeRO-0)"],
    ),
    "float64 on DeepSpeed": (
        DEEPSPEED,
        {"precision": "fp64"},
        ["train.precision = fp64 with parallel.engine = deepspeed", "fp32 or bf16"],
    ),
    "muon over tensor": (
        {"tensor": 2},
        {"optimizer": {"name": "muon"}},
        ["optimizer.name = muon needs whole matrices", "parallel.tensor 2 cuts"],
    ),
    "muon over shards": (
        {"data_shard": "optimizer"},
        {"optimizer": {"name": "muon"}, "processes": 2},
        ["optimizer.name = muon", "parallel.data_shard = optimizer cuts them"],
    ),
    "muon on DeepSpeed": (
        DEEPSPEED,
        {"optimizer": {"name": "muon"}},
        ["optimizer.name = muon with parallel.engine"],
    ),
    "apex on DeepSpeed": (
        DEEPSPEED,
        {"optimizer": {"implementation": "apex"}},
        ["optimizer.implementation = apex with"],
    ),
    "apex for SGD": (
        {},
        {"optimizer": {"implementation": "apex", "name": "sgd"}},
        ["optimizer.implementation = apex is for AdamW"],
    ),
    "operations under zero-bubble": (
        PP4 | {"schedule": "zero-bubble", "recompute": "selective", "recompute_policy": "operations"},
        {},
        ["parallel.recompute_policy = operations with parallel.schedule = zero-bubble", "only once"],
    ),
    "offload of SGD": (
        DEEPSPEED | {"offload": "optimizer", "data_shard": "full"},
        {"optimizer": {"name": "sgd"}},
        ["parallel.offload = optimizer runs AdamW on the host, and optimizer.name is sgd"],
    ),
    "never compared": (
        DEEPSPEED | PP4 | {"context": 2, "data_shard": "optimizer"},
        {"processes": 16},
        ["context x pipeline (1f1b) x data_shard optimizer on deepspeed was never compared with one process"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_refused_is_refused_in_the_users_words(name: str) -> None:
    parallel, rest, words = CASES[name]
    found = refused(parallel, **rest)
    # the config decides it alone, on every machine: exit code 2, never 6
    assert [error.exit_code for error in found] == [EXIT_USAGE], [str(error) for error in found]
    for part in words:
        assert part in str(found[0])


@pytest.mark.parametrize("number", range(len(TESTED)))
def test_every_combination_that_is_tested_passes(number: int) -> None:
    combination = TESTED[number]
    section, processes = combination.smallest()
    assert combination_of(section, resolve_layout(section, processes)) == combination
    assert refused(section.model_dump(exclude_defaults=True), processes) == []


def test_the_resolved_config_with_every_default_written_out_passes() -> None:
    assert refused(ParallelSection().model_dump(exclude_none=True)) == []


def test_the_example_of_the_readme_passes() -> None:
    parallel = {"tensor": 4, "sequence": True, "pipeline": 4, "schedule": "interleaved", "data_shard": "full"}
    assert refused(parallel | {"recompute": "selective"}, 32) == []


def test_the_first_refusal_is_raised_and_all_are_listed() -> None:
    section = ParallelSection(tensor=8, sequence=True, pipeline=16, schedule="1f1b", recompute_layers=3)
    train = TrainSection(global_batch_size=4)
    arguments = (resolve_layout(section, 128), shape_of(), train, OptimizerSection(), [BatchShape(63, 4)], "bf16")
    listed = [str(error) for error in refusals(section, *arguments)]
    assert [
        words in line
        for words, line in zip(
            ["recompute_layers", "attention_heads", "pipeline 16", "seq_length 63", "cannot run 4"], listed, strict=True
        )
    ] == [True] * 5
    with pytest.raises(ConfigError, match="recompute_layers"):
        check_layout(section, *arguments)


def test_every_batch_of_every_stage_is_looked_at() -> None:
    section, train = ParallelSection(pipeline=2), TrainSection(global_batch_size=8)
    batches = [BatchShape(64, 8), BatchShape(64, 3), BatchShape(64, 1)]
    found = list(refusals(section, resolve_layout(section, 4), shape_of(), train, OptimizerSection(), batches, "fp32"))
    assert ["size 3" in str(found[0]), "size 1" in str(found[1])] == [True, True] and len(found) == 2


@pytest.mark.parametrize("implementation", ["apex", "triton"])
def test_another_adamw_is_for_adamw_on_the_torch_engine(implementation: str) -> None:
    words, asked = f"optimizer.implementation = {implementation}", {"implementation": implementation}
    assert [f"{words} is for AdamW" in str(one) for one in refused({}, optimizer={"name": "sgd"} | asked)] == [True]
    assert [f"{words} with parallel.engine" in str(one) for one in refused(DEEPSPEED, optimizer=asked)] == [True]
    assert not refused({}, optimizer=asked)


def test_narrow_gradients_are_for_one_process_in_bf16() -> None:
    narrow = {"gradients": "bf16"}
    assert not refused({}, train=narrow, precision="bf16") and not refused({}, train=narrow, precision="auto")
    for found in (
        refused({}, train=narrow, precision="fp32"),
        refused({}, 2, train=narrow, precision="bf16"),
        refused(DEEPSPEED, train=narrow, precision="bf16"),
    ):
        assert ["train.gradients = bf16 is for one process of the torch engine" in str(one) for one in found] == [True]
