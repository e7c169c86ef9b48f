"""Laws of step times, accelerators and hours, and a run's own figures fed back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_run import CONFIG, make_run

from megatron.config.errors import ConfigError, DataError
from megatron.config.layout import resolve_layout
from megatron.config.layout_checks import BatchShape
from megatron.config.load import load_config
from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.schema import ModelSection, OptimizerSection, ParallelSection, TrainSection
from megatron.planner.bubble import bubble_fraction
from megatron.planner.hardware import HARDWARE, Efficiency, default_efficiency, find_accelerator
from megatron.planner.measured_efficiency import measure_run, measured_efficiency
from megatron.planner.resolve import resolve_run
from megatron.planner.run_time import Pause, run_time, save_seconds, step_times
from megatron.planner.step_time import StepTime, step_time

H100 = HARDWARE["h100"]
IDEAL = Efficiency(
    products=1,
    attention=1,
    memory=1,
    links=1,
    network=1,
    overlap=1,
    half_size=0,
    attention_half_length=0,
    layer_launch=0,
)


def shape(preset: str = "llama-8b", length: int = 4096) -> ModelShape:
    return resolve_model(ModelSection(preset=preset, seq_length=length), 128256)


def timed(
    processes: int = 8,
    batch: int = 64,
    micro: int = 1,
    by: Efficiency | None = None,
    model: ModelShape | None = None,
    optimizer: OptimizerSection | None = None,
    device: Any = H100,
    **parallel: Any,
) -> StepTime:
    section = ParallelSection(**parallel)
    train = TrainSection(global_batch_size=batch, micro_batch_size=micro)
    layout = resolve_layout(section, processes)
    given = optimizer or OptimizerSection()
    return step_time(model or shape(), section, layout, train, given, BatchShape(4096, batch), device, by)


LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (8, {}),
    (16, {"data_shard": "full"}),
    (16, {"data_shard": "full", "data_replicate": 2}),
    (8, {"tensor": 8, "sequence": True}),
    (32, {"tensor": 8, "pipeline": 4}),
    (32, {"tensor": 4, "sequence": True, "pipeline": 4, "schedule": "interleaved", "data_shard": "optimizer"}),
    (8, {"context": 8}),
    (8, {"context": 4, "recompute": "full"}),
    (4, {"pipeline": 4, "schedule": "zbv", "recompute": "selective"}),
]


@pytest.mark.parametrize(("processes", "parallel"), LAYOUTS, ids=str)
def test_parts_add_up_and_the_floor_is_a_floor(processes: int, parallel: dict[str, Any]) -> None:
    found = timed(processes, **parallel)
    parts = found.products + found.attention + found.memory_bound + found.recompute + found.bubble
    assert found.total == pytest.approx(parts + found.communication + found.optimizer + found.launch)
    assert 64 * 4096 / found.total == pytest.approx(found.tokens_per_second)
    # No rank does more than its share of the model's operations: at the full peak nothing could be quicker.
    floor = 64 * 4096 * shape().flops_per_token(4096) / (processes * H100.peak_flops)
    assert found.total > timed(processes, by=IDEAL, **parallel).total > floor
    assert found.mfu_causal == pytest.approx(floor / found.total) and found.mfu_full > found.mfu_causal


def test_one_process_at_the_data_sheet_is_the_arithmetic() -> None:
    """The model's matrix operations by the whole peak; what attention's backward pass computes again comes on top."""
    found = timed(1, 4, by=replace(IDEAL, memory=1.0))
    model = shape()
    tokens, each = 4 * 4096, model.num_hidden_layers * 2 * 4096 * model.num_attention_heads * model.head_dim
    multiplied = model.flops_per_token(4096) - 3 * each
    assert found.products == pytest.approx(tokens * multiplied / H100.peak_flops, rel=1e-3)
    assert found.attention >= tokens * 3 * each / H100.peak_flops


def test_a_pipeline_of_equal_stages_waits_as_its_formula_says() -> None:
    model = replace(shape(), num_hidden_layers=32, padded_vocab_size=64, vocab_size=64)
    for schedule in ("1f1b", "interleaved", "zero-bubble"):
        found = timed(4, 32, by=IDEAL, model=model, pipeline=4, schedule=schedule)
        share = found.bubble / (found.total - found.communication - found.optimizer)
        assert share == pytest.approx(float(bubble_fraction(schedule, 4, 2, 32)), rel=0.02)


def test_what_costs_more_takes_longer() -> None:
    plain = timed(8).total
    assert timed(8, recompute="selective").total > plain
    assert timed(8, recompute="full").total > timed(8, recompute="selective", recompute_policy="operations").total
    assert timed(8, recompute="full", recompute_layers=4).total < timed(8, recompute="full").total
    slow = replace(H100, network_bandwidth=H100.network_bandwidth / 8)
    assert timed(64, device=slow, data_shard="full").total > timed(64, data_shard="full").total
    assert timed(8, device=slow).total == plain  # nothing leaves the node
    assert timed(8, 64, 2).total < plain  # larger products, and gradients added less often
    muon = timed(1, 8, optimizer=OptimizerSection(name="muon"))
    assert muon.optimizer > timed(1, 8).optimizer > timed(1, 8, optimizer=OptimizerSection(name="sgd")).optimizer


def test_hybrid_shards_keep_gathers_inside_the_node() -> None:
    slow = replace(H100, network_bandwidth=1e9)
    hybrid = timed(64, device=slow, data_shard="full", data_replicate=8)
    assert hybrid.exposed["data"] < timed(64, device=slow, data_shard="full").exposed["data"]


def test_precision_and_peak() -> None:
    section, train = ParallelSection(), TrainSection(global_batch_size=4, precision="fp32")
    wide = step_time(
        shape(), section, resolve_layout(section, 1), train, OptimizerSection(), BatchShape(4096, 4), H100, IDEAL
    )
    assert wide.products == pytest.approx(timed(1, 4, by=IDEAL).products * H100.peak_flops / H100.fp32_flops, rel=1e-3)


def test_the_host_is_a_floor() -> None:
    model = shape("llama-160m")
    slow = timed(1, 8, by=Efficiency(layer_launch=1.0), model=model)
    assert slow.total == pytest.approx(8 * model.num_hidden_layers * 1.0) and slow.launch > 0


def test_an_accelerator_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('like = "h100"\nnetwork_bandwidth = 25e9\nname = "half a network"')
    mine = find_accelerator(str(path))
    assert mine == replace(H100, name="half a network", network_bandwidth=25e9, sources=str(path))
    whole = "\n".join(f"{key} = {value!r}" for key, value in vars(H100).items() if key not in ("name", "sources"))
    path.write_text(whole)
    assert find_accelerator(str(path)) == replace(H100, name="mine", sources=str(path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("peak_flops = 1e12", "lacks memory_bytes, fp32_flops"),
        ('like = "h100"\npeak_flop = 1', "did you mean 'peak_flops'"),
        ('like = "h1000"', "like = 'h1000' is unknown: set one of a100-40, a100, h100"),
        ('like = "h100"\nmemory_bytes = 1.5', "memory_bytes = 1.5 must be a whole number"),
        ('like = "h100"\npeak_flops = "fast"', "peak_flops = 'fast' must be a number"),
        ('like = "h100"\npeak_flops = -1', "peak_flops = -1 must be a number above 0"),
        ('like = "h100"\nproducts = 1.2', "products = 1.2 is a share, at most 1"),
        ("like =", "is no TOML"),
    ],
)
def test_a_file_that_is_no_accelerator_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        find_accelerator(str(path))
    assert words in str(refused.value) and str(path) in str(refused.value)


def test_an_unknown_accelerator_is_refused() -> None:
    for name, words in (("h10", "did you mean"), ("/nowhere/x.toml", "cannot be read")):
        with pytest.raises(ConfigError, match=words):
            find_accelerator(name)
    with pytest.raises(ConfigError, match="products = 0 must be a share"):
        Efficiency(products=0)


def test_hours_are_those_of_every_step(tmp_path: Path) -> None:
    """A schedule with a changing shape, step by step, against the sum by stages."""
    text = CONFIG.replace(
        'name = "text"\nsteps = 6', 'name = "text"\nsteps = 6\nseq_length = 32\nglobal_batch_size = 4'
    )
    config = load_config(make_run(tmp_path, text=text))
    run = resolve_run(config)
    model = resolve_model(config.model, 300, 32)
    layout = resolve_layout(config.parallel, 1)
    given = model, config.parallel, layout, config.train, config.optimizer, H100
    steps = step_times(run.schedule, *given)
    saving, validating = Pause(config.checkpoint.every, 2.0), Pause(5, 0.5)
    found = run_time(run.schedule, steps, 16, saving, validating)
    seconds, saves, looks = 0.0, 0, 0
    for number in range(1, run.schedule.steps + 1):
        stage = next(s for s in run.schedule.stages if number <= s.end_step)
        seconds += steps[BatchShape(stage.seq_length, stage.global_batch_size)].total
        saves += number % 3 == 0 or number == stage.end_step
        looks += number % 5 == 0 or number == stage.end_step
    assert [s.name for s in found.stages] == ["balanced", "text", "cooldown"]
    assert sum(s.seconds for s in found.stages) == pytest.approx(seconds)
    assert sum(s.saves for s in found.stages) == saves
    assert found.seconds == pytest.approx(seconds + 2.0 * saves + 0.5 * looks)
    assert found.gpu_hours == pytest.approx(16 * found.seconds / 3600)
    assert (save_seconds(10**12, 10**10), save_seconds(10**12, 10**10, True)) == (100.0, 0.0)


def metrics_rows(seconds: list[float], tokens: int = 128, samples: int = 8) -> list[dict[str, Any]]:
    return [
        {"step": n, "tokens": tokens, "samples_by_source": {"prose": samples}, "step_seconds": s, "skipped": False}
        for n, s in enumerate(seconds, 1)
    ]


def a_run(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    make_run(tmp_path).rename(folder / "config.toml")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_runs_own_steps_are_fed_back(tmp_path: Path) -> None:
    """Slow first steps, a step before a restart at another layout, and an outlier change nothing."""
    rows = metrics_rows([9.0] * 4 + [50.0, 50.0, 50.0, 1.0, 1.0, 1.0, 1.0, 1.0, 30.0])
    rows[4]["start"] = {"layout": "2 processes: data 2", "precision": "fp32"}
    found = measure_run(a_run(tmp_path, rows), H100)
    assert (found.processes, found.layout, found.batches[0].steps) == (2, "data 2", 6)
    assert found.batches[0].batch == BatchShape(16, 8) and found.batches[0].measured == 1.0
    by = measured_efficiency(tmp_path / "run", H100)
    assert "6 steps" in by.words and by == replace(default_efficiency(H100), step=found.ratio, words=by.words)
    # what is planned with it takes what was measured
    config = load_config(tmp_path / "run" / "config.toml")
    model, layout = resolve_model(config.model, 257, 16), resolve_layout(config.parallel, 2)
    train = config.train.model_copy(update={"precision": "fp32"})
    again = step_time(model, config.parallel, layout, train, config.optimizer, BatchShape(16, 8), H100, by)
    assert again.total == pytest.approx(1.0, rel=1e-2)


def test_a_run_that_says_too_little_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no config.toml"):
        measured_efficiency(tmp_path, H100)
    folder = a_run(tmp_path, metrics_rows([1.0] * 7))
    with pytest.raises(DataError, match="has 7 steps since the run's last start, and 8 are needed"):
        measured_efficiency(folder, H100)
    rows = metrics_rows([1.0] * 9)
    del rows[-1]["samples_by_source"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="step 9: the row does not say"):
        measured_efficiency(folder, H100)
