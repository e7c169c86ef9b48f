"""The layout's part of a plan: what it shows, what it warns of, and that train refuses exactly that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from planned_runs import planned

from megatron.commands import plan as plan_command
from megatron.config.errors import ConfigError, StagemixError
from megatron.config.kernel_checks import check_kernels
from megatron.config.layout import resolve_layout
from megatron.config.layout_checks import BatchShape, check_layout
from megatron.config.load import config_to_toml
from megatron.config.model_shape import resolve_model
from megatron.config.schema import KernelsSection, ModelSection, OptimizerSection, ParallelSection, TrainSection
from megatron.planner.layout_bytes import rank_bytes, rank_tensors
from megatron.planner.layout_plan import default_processes, plan_layout

MODEL = ModelSection(
    seq_length=64,
    vocab_size=1000,
    hidden_size=64,
    num_hidden_layers=10,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=192,
)
SHAPE = resolve_model(MODEL, 1000)
TRAIN = TrainSection(global_batch_size=32, micro_batch_size=2, precision="bf16")


def layout_of(parallel: dict[str, Any], processes: int, **optimizer: Any) -> dict[str, Any]:
    section = ParallelSection.model_validate(parallel)
    return plan_layout(
        section, SHAPE, TRAIN, OptimizerSection(**optimizer), [BatchShape(64, 32), BatchShape(32, 16)], processes
    )


def test_layers_microbatches_bubble_and_bytes() -> None:
    found = layout_of({"tensor": 2, "pipeline": 2, "data_shard": "optimizer", "sequence": True}, 8)
    assert found["words"] == "pipeline 2 (1f1b) x data 2 (optimizer sharded) x tensor 2 with sequence"
    assert found["refusals"] == [] and found["notes"] == []
    assert [row["microbatches"] for row in found["batches"]] == [8, 4]
    assert [row["bubble"] for row in found["batches"]] == [1 / 9, 1 / 5]
    assert [row["layers"] for row in found["stages"]] == [[0, 6], [6, 10]]  # the head is worth 1.2 layers
    assert sum(row["parameters"] for row in found["stages"]) == SHAPE.parameter_count()
    # a stage's matrices lie on two tensor ranks, norms on each; all of it is cut over two data ranks
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 192
    words, per_layer = 1024 * 64 // 2, layer // 2 + 2 * 64
    first, last = (row["bytes"] for row in found["ranks"])
    for held, tensors, elements in (
        (first, 6 * 9 + 1, 6 * per_layer + words),
        (last, 4 * 9 + 2, 4 * per_layer + words + 64),
    ):
        assert held["parameters"] == held["gradients"] == 4 * elements // 2
        assert held["optimizer"] == 8 * elements // 2 + 4 * tensors
        assert held["total"] == held["parameters"] + held["gradients"] + held["optimizer"]


def test_gradients_that_are_added_up_narrow_take_half() -> None:
    section, batch = ParallelSection(), [BatchShape(64, 4)]
    found = {}
    for gradients in ("fp32", "bf16"):
        train = TrainSection(global_batch_size=4, precision="bf16", gradients=gradients)  # type: ignore[arg-type]
        (row,) = plan_layout(section, SHAPE, train, OptimizerSection(), batch, 1)["ranks"]
        found[gradients] = row["bytes"]
    count = SHAPE.parameter_count()
    assert (found["fp32"]["gradients"], found["bf16"]["gradients"]) == (4 * count, 2 * count)
    assert found["fp32"]["total"] - found["bf16"]["total"] == 2 * count


def test_what_is_on_its_way_between_stages_does_not_grow_with_the_batch() -> None:
    found = layout_of({"pipeline": 2, "tensor": 2, "sequence": True}, 8)
    # 1f1b: three messages of a microbatch: 2 rows, half of 64 positions, width 64, bf16
    assert found["batches"][0]["receive_bytes"] == 3 * 2 * 32 * 64 * 2
    interleaved = layout_of({"pipeline": 2, "schedule": "interleaved"}, 2)
    # of two stages on the last rank: three receives ahead, and three gradients sent from each
    assert interleaved["batches"][0]["receive_bytes"] == (3 + 2 * 3) * 2 * 64 * 64 * 2
    assert layout_of({"tensor": 2}, 2)["batches"][0]["receive_bytes"] == 0


def test_stages_of_interleaved_and_zbv_lie_on_their_ranks() -> None:
    found = layout_of({"pipeline": 2, "schedule": "interleaved"}, 2)
    assert [row["rank"] for row in found["stages"]] == [0, 1, 0, 1] and found[
        "words"
    ] == "pipeline 2 (interleaved, 2 stages a rank)"
    assert [row["rank"] for row in layout_of({"pipeline": 2, "schedule": "zbv"}, 2)["stages"]] == [0, 1, 1, 0]


def test_shards_of_rows_that_do_not_divide_add_up() -> None:
    section = ParallelSection(data_shard="full", data_replicate=2)
    layout = resolve_layout(section, 14)
    parts = [rank_bytes(SHAPE, section, layout, OptimizerSection(), "fp32", 0, shard) for shard in range(7)]
    assert sum(part.parameters for part in parts) == 4 * SHAPE.parameter_count()
    assert parts[0].parameters == max(part.parameters for part in parts) > parts[-1].parameters


@pytest.mark.parametrize(("name", "bytes_each"), [("adamw", 8), ("sgd", 0), ("muon", 4)])
def test_state_of_each_optimizer(name: str, bytes_each: int) -> None:
    section, layout = ParallelSection(), resolve_layout(ParallelSection(), 1)
    tensors = [item for stage in rank_tensors(SHAPE, section, 0) for item in stage]
    adam = [item for item in tensors if name == "adamw" or (name == "muon" and not item.matrix)]
    found = rank_bytes(SHAPE, section, layout, OptimizerSection(name=name), "bf16", 0).optimizer
    others = sum(item.rows * item.width for item in tensors if item not in adam)
    assert found == sum(8 * item.rows * item.width + 4 for item in adam) + bytes_each * others
    momentum = OptimizerSection(name="sgd", momentum=0.9)
    assert rank_bytes(SHAPE, section, layout, momentum, "fp64", 0).optimizer == 8 * SHAPE.parameter_count()


def test_other_sizes_of_a_pipeline_rank_hold_the_whole_model() -> None:
    for section in (ParallelSection(pipeline=4, schedule="zbv"), ParallelSection(pipeline=5), ParallelSection()):
        names = [
            i.name for rank in range(section.pipeline) for stage in rank_tensors(SHAPE, section, rank) for i in stage
        ]
        assert len(names) == len(set(names)) == 9 * 10 + 3


REFUSED: list[dict[str, Any]] = [
    {"tensor": 3},
    {"sequence": True},
    {"pipeline": 4, "schedule": "zbv", "data_shard": "full"},
    {"engine": "deepspeed", "context": 2, "pipeline": 2},
    {"pipeline": 11},
    {"engine": "deepspeed", "pipeline": 2, "data_shard": "full"},
]


@pytest.mark.parametrize("parallel", REFUSED)
def test_a_plan_warns_of_exactly_what_train_refuses(parallel: dict[str, Any]) -> None:
    section = ParallelSection.model_validate(parallel)
    processes = 2 * section.tensor * section.pipeline * section.context
    found = layout_of(parallel, processes)
    batches = [BatchShape(64, 32), BatchShape(32, 16)]
    layout = resolve_layout(section, processes)
    with pytest.raises(StagemixError) as refused:
        check_layout(section, layout, SHAPE, TRAIN, OptimizerSection(), batches, "bf16")
    assert found["refusals"][0] == {"exit_code": refused.value.exit_code, "text": str(refused.value)}
    assert "ranks" not in found


FORBIDDEN: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"compile": "layers"}, {"pipeline": 2, "schedule": "zbv"}, "parallel.schedule = zbv splits the backward pass"),
    ({"compile": "layers"}, {"recompute": "selective", "recompute_policy": "operations"}, "sees no operations inside"),
    ({"compile": "layers"}, {"engine": "deepspeed"}, "was never compared with compiled layers"),
    ({"cuda_graphs": True}, {"tensor": 2}, "does not go with 2 processes"),
    ({"cuda_graphs": True, "attention": "unfused"}, {}, "does not go with kernels.attention = unfused"),
    ({"fp8": True}, {"tensor": 2}, "is for one process, and there are 2"),
    ({"attention": "cudnn"}, {"context": 2, "context_method": "gather"}, "keys are gathered over context ranks"),
    ({"attention": "varlen"}, {}, "and attention here in float32"),
]


@pytest.mark.parametrize("kernels, parallel, words", FORBIDDEN)
def test_a_plan_warns_of_kernels_that_train_refuses_in_the_same_words(
    kernels: dict[str, Any], parallel: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(run_file(tmp_path, kernels=kernels, train={"precision": "fp32"}, **parallel)), "--json"]
    if kernels.get("cuda_graphs"):
        arguments += ["--set", "train.precision=bf16"]
    plan_command.main(arguments)
    (text,) = [row["text"] for row in json.loads(capsys.readouterr().out)["warnings"] if "the kernels" in row["text"]]
    assert words in text and text.startswith("train will refuse the kernels: kernels.")
    section = ParallelSection.model_validate(parallel)
    train = TrainSection(global_batch_size=4, precision="bf16" if kernels.get("cuda_graphs") else "fp32")
    with pytest.raises(ConfigError) as refused:
        check_kernels(KernelsSection(**kernels), section, default_processes(section), SHAPE, train, train.precision)
    assert text == f"train will refuse the kernels: {refused.value}"


def test_kernels_that_the_layout_allows_are_no_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run_file(tmp_path, kernels={"compile": "layers", "attention": "varlen"}, pipeline=2, recompute="full")
    plan_command.main([str(file), "--json"])
    assert not [row for row in json.loads(capsys.readouterr().out)["warnings"] if "kernels" in row["text"]]


def run_file(
    folder: Path,
    model: dict[str, Any] | None = None,
    kernels: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    **parallel: Any,
) -> Path:
    over = {"model": MODEL.model_dump(exclude_none=True) | (model or {}), "parallel": parallel}
    over["kernels"] = kernels or {}
    over["train"] = {"global_batch_size": 4, "micro_batch_size": 1} | (train or {})
    config = planned(folder, **over)
    file = folder / "run.toml"
    file.write_text(config_to_toml(config))
    return file


def shown(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert plan_command.main([str(word) for word in argv]) == 0
    return capsys.readouterr().out


def test_plan_shows_the_layout_of_so_many_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run_file(tmp_path, pipeline=2, data_shard="full")
    out = shown(capsys, file, "--processes", "4", "--width", "100")
    assert "Layout over 4 processes: pipeline 2 (1f1b) x data 2 (fully sharded)" in out
    assert "2 microbatches a step on each data rank, bubble 33.3% of the step" in out
    assert "0-5" in out and "MB of each pipeline rank" in out and "train will refuse" not in out
    record = json.loads(shown(capsys, file, "--json"))
    assert record["layout"]["processes"] == 2 and record["layout"]["axes"]["shard"] == 1
    assert any("cuts nothing" in row["text"] for row in record["warnings"])


def test_plan_of_one_process_says_nothing_of_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run_file(tmp_path)
    assert "Layout" not in shown(capsys, file, "--width", "100")
    assert json.loads(shown(capsys, file, "--json"))["layout"]["words"] == "one process"


def test_plan_warns_where_train_would_refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run_file(tmp_path, tensor=3)
    found = json.loads(shown(capsys, file, "--json", "--processes", "6"))["warnings"]
    (row, *_) = [row for row in found if row["kind"] == "train-refuses"]
    assert (
        row["exit_code"] == 2
        and "train will refuse the layout over 6 processes: model.num_attention_heads 4" in row["text"]
    )


def test_a_number_of_processes_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StagemixError, match="7 processes are not a multiple of pipeline 1 x context 1 x tensor 2 = 2"):
        plan_command.main([str(run_file(tmp_path, tensor=2)), "--processes", "7"])
    with pytest.raises(SystemExit):
        plan_command.main([str(run_file(tmp_path, tensor=2)), "--processes", "0"])


def test_an_unknown_vocabulary_hides_bytes_and_refuses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run_file(tmp_path, tensor=4)
    text = file.read_text().replace("vocab_size = 1000\n", "")
    file.write_text(text.replace('path = "bytes"', 'path = "nowhere.json"'))
    record = json.loads(shown(capsys, file, "--json"))["layout"]
    assert record["refusals"] == [] and "ranks" not in record and record["batches"][0]["microbatches"] == 4


@pytest.mark.parametrize(("processes", "sizes"), [((), "8 or 10"), (("--processes", "2"), "8 or 12")])
def test_a_batch_is_recommended_that_fits_as_many_processes_as_are_said(
    tmp_path: Path, processes: tuple[str, ...], sizes: str
) -> None:
    words = [str(run_file(tmp_path)), "--set", "train.global_batch_size=9", "--set", "train.micro_batch_size=2"]
    with pytest.raises(StagemixError, match=rf"set train\.global_batch_size to {sizes} \("):
        plan_command.main([*words, *processes])
