"""What benchmarks/gpu.py's figures rest on: operations by hand, a checker that finds what is wrong, clocks, fits."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu_correctness
import gpu_curves
import gpu_job
import gpu_layouts
import gpu_models
import gpu_operations
import gpu_results
import gpu_training
import roofline
from gpu_operations import Inputs, Maker, Operation, Sizes, Traffic


def _context(tmp_path: Path, **arguments: Any) -> gpu_job.Context:
    words = {"device": "none", "command": "test"}
    results, clock = gpu_results.Results(tmp_path, words, dry=True), gpu_job.Clock(1000)
    given = Namespace(**{"only": None, "profile": "", "choose_again": False, **arguments})
    return gpu_job.Context(torch.device("cpu"), True, 1, tmp_path, results, clock, clock, given)


def test_operations_of_a_token_by_hand() -> None:
    # Llama-3-8B. Layer: 4096 (2 x 4096 + 2 x 1024) + 3 x 4096 x 14336 + 2 x 4096 = 218,112,000.
    shape = gpu_models.shape_of("llama-8b", 8192)
    assert shape.parameter_count() == 32 * 218_112_000 + 2 * 128_256 * 4096 + 4096 == 8_030_261_248
    multiplied = 8_030_261_248 - 128_256 * 4096
    assert shape.flops_per_token(8192) == 6 * multiplied + 6 * 32 * 4096 * 8192 == 51_471_998_976
    assert shape.flops_per_token(8192, causal=False) == 51_471_998_976 + 6 * 32 * 4096 * 8192 == 57_914_449_920
    # Llama-3.2-1B: the head is the embedding, which is multiplied, so that nothing is left out.
    tied = gpu_models.shape_of("llama-1b", 2048)
    assert tied.parameter_count() == 16 * 60_821_504 + 128_256 * 2048 + 2048 == 1_235_814_400
    assert tied.flops_per_token(2048) == 6 * 1_235_814_400 + 6 * 16 * 2048 * 2048


def test_utilisation_agrees_with_what_others_published() -> None:
    # ml-engineering: 8B at 8192, 8,950 tokens/s on an H200, 47 % causal; torchtitan: 6,670, at most 39 % whole.
    shape = gpu_models.shape_of("llama-8b", 8192)
    found = gpu_models.utilisation(shape, 8192, 8950, 989e12)
    assert found.causal == pytest.approx(8950 * 51_471_998_976 / 989e12) and round(100 * found.causal) == 47
    assert round(100 * gpu_models.utilisation(shape, 8192, 6670, 989e12).whole) == 39
    assert gpu_models.utilisation(shape, 8192, 989e12 / 51_471_998_976, 989e12).words() == "100.0 % c, 112.5 % n"
    words = gpu_models.published_words("llama-8b", 8192)
    assert "ml-engineering" in words and "8x H200" in words and "llmq" not in words
    assert "llmq, 1x H100" in gpu_models.published_words("llama-600m", 4096)


@pytest.mark.parametrize(
    "words", [["--tokens", "0"], ["--seq-length", "-1"], ["--tokens", "100", "--seq-length", "64"]]
)
def test_a_roofline_of_no_tokens_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        roofline.main(words)
    assert stopped.value.code == 2 and f"error: {words[0]} {words[1]}: " in capsys.readouterr().err


def test_limits_are_the_larger_of_bytes_and_operations() -> None:
    assert Traffic(8e12, 4e12, 2e12).limits(copy=4e12, gemm=1e12) == (2.0, 1.0)
    assert Traffic(4e12, 0, 8e12, 4e12).limits(copy=4e12, gemm=1e12) == (8.0, 4.0)
    layers = gpu_operations.all_operations()
    # 16,384 tokens of 4096 in bfloat16 at 4.3 TB/s: 125 us for the addition and the norm, and 328 us and 546 us for the
    # gated activation of 14336 (the tables that the field's figures are in).
    forward, _ = layers["add_rms_norm"].traffic({"rows": 16384, "size": 4096}, 2).limits(4.3e12, 8e14)
    assert forward == pytest.approx(125e-6, rel=0.01)
    both = layers["gated_halves"].traffic({"rows": 16384, "inner": 14336}, 2).limits(4.3e12, 8e14)
    assert both == (pytest.approx(328e-6, rel=0.01), pytest.approx(546e-6, rel=0.01))


def _operation(triton: Any, ways: dict[str, Any] | None = None) -> Operation:
    def inputs(sizes: Sizes, make: Maker) -> Inputs:
        return {"x": make.normal(sizes["rows"], 8)}

    eager = lambda given: lambda: given["x"] * 2  # noqa: E731
    return Operation(
        "twice", inputs, {"eager": eager, "triton": triton, **(ways or {})}, lambda sizes, item: Traffic(1.0),
        ({"rows": 3},), ({"rows": 3},), ({"rows": 3},), dtypes=(torch.float32,),
    )  # fmt: skip


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return 2 * grad + 0.01


_TURNS = iter(range(1000))
WRONG = {
    "a little off": lambda given: lambda: given["x"] * 2.001,
    "one element": lambda given: lambda: given["x"] * 2 + 0.01 * (torch.arange(24).view(3, 8) == 5),
    "not a number": lambda given: lambda: given["x"] * 2 + torch.nan * (torch.arange(24).view(3, 8) == 5),
    "the gradient": lambda given: lambda: _WrongGradient.apply(given["x"]),
    "not twice the same": lambda given: lambda: given["x"] * 2 * (1 + 2e-7 * (next(_TURNS) % 2)),
    "it raises": lambda given: lambda: given["x"] @ given["x"],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_kernel_that_is_wrong_is_found(tmp_path: Path, name: str) -> None:
    operation = _operation(WRONG[name])
    eager, found = gpu_correctness._check(_context(tmp_path), operation, torch.float32, {"rows": 3})
    assert "failed" in found and "failed" not in eager, found


def test_a_kernel_that_is_right_or_not_there_is_no_failure(tmp_path: Path) -> None:
    missing = {"later": gpu_operations.door("not_written_yet", "f"), "older": gpu_operations.door("swiglu", "no_such")}
    operation = _operation(lambda given: lambda: given["x"] + given["x"], missing)
    rows = gpu_correctness._check(_context(tmp_path), operation, torch.float32, {"rows": 3})
    assert not [row for row in rows if "failed" in row]
    assert ["not here" in row for row in rows] == [False, False, True, True]


H200 = 150.7e9


@pytest.mark.parametrize("preset", ["llama-600m", "llama-1b", "llama-3b", "llama-8b"])
@pytest.mark.parametrize("length", [1024, 2048, 8192])
def test_fits_are_below_the_memory_and_ordered(preset: str, length: int) -> None:
    shape = gpu_models.shape_of(preset, length)
    gradients = gpu_layouts.gradients_for(shape, H200)
    assert gradients == ("bf16" if preset == "llama-8b" else "fp32")
    tried = list(gpu_layouts.fits(shape, length, H200, gradients))
    assert all(fit.bytes + gpu_layouts.state_bytes(shape, gradients) < 0.94 * H200 for fit in tried)
    if preset != "llama-8b":
        assert tried[0].recomputed == 0 and tried[0].micro_batch * length >= 8192
    whole = [fit for fit in tried if fit.recomputed == shape.num_hidden_layers]
    assert whole and min(fit.bytes for fit in whole) == min(fit.bytes for fit in tried)


def test_out_of_memory_leads_to_the_next_smaller_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = _context(tmp_path)
    context.dry = False
    asked: list[gpu_layouts.Fit] = []

    def measured(_: Any, setting: gpu_training.Setting) -> dict[str, Any]:
        asked.append(setting.fit)
        if len(asked) < 3:
            raise torch.OutOfMemoryError("too much")
        return {"seconds": 2.0, "steps": 4, "ready": 1.0, "loss": 5.0, "words": "norm eager"}

    monkeypatch.setattr(gpu_training, "_measured", measured)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=H200))
    ceilings = SimpleNamespace(gemm=800e12)
    monkeypatch.setattr(gpu_training, "ceilings_of", lambda context: ceilings)
    (row,) = gpu_training.run_case(context, gpu_training.Case("llama-8b", 2048))
    assert [fit.bytes for fit in asked] == sorted((fit.bytes for fit in asked), reverse=True) and len(asked) == 3
    assert row["out of memory before"].count("rows") == 2 and row["gradients"] == "bf16"
    assert row["tokens/s"] == round(row["tokens a step"] / 2.0) and "% c" in row["MFU of the best product"]
    monkeypatch.setattr(gpu_training, "_measured", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    (row,) = gpu_training.run_case(context, gpu_training.Case("llama-8b", 2048))
    assert "out of memory with every one" in row["failed"]


class _FakeEvent:
    """CUDA's clock, which the calls below move; milliseconds."""

    now = 0.0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = _FakeEvent.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _FakeEvent) -> float:
        return end.at - self.at


def test_calls_are_timed_by_events_and_their_median_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", _FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    # Three calls that are not counted, of which the last says how many are: 0.25 s / 20 ms. Every third one is slow.
    lasts = iter([500.0, 500.0, 20.0, *[30.0, 10.0, 10.0] * 4])

    def call() -> None:
        _FakeEvent.now += next(lasts)

    taken = gpu_job.Timer(torch.device("cuda")).seconds(call, flush=False)
    assert taken.calls == 12 and next(lasts, None) is None
    assert (
        taken.median == pytest.approx(0.010)
        and taken.low == pytest.approx(0.010)
        and taken.high == pytest.approx(0.030)
    )
    steps = [20.0, 40.0]
    engine = SimpleNamespace(launch_step=lambda batch, lr: _launched(steps.pop(0)))
    seconds, losses = gpu_training._steps(engine, [[], []], 2, torch.device("cuda"))  # type: ignore[arg-type]
    assert seconds == pytest.approx([0.020, 0.040]) and losses == [20.0, 40.0]


def _launched(milliseconds: float) -> Any:
    _FakeEvent.now += milliseconds
    return SimpleNamespace(result=lambda: SimpleNamespace(updated=True, loss=milliseconds))


def test_curves_are_compared_step_by_step() -> None:
    assert gpu_curves.apart_of([2.0, 3.0], [2.0, 4.0]) == [0.0, 0.25]
    with pytest.raises(ValueError):
        gpu_curves.apart_of([1.0], [1.0, 2.0])
    seconds = {("fp32", "triton"): 1.0, ("fp32", "cpu"): 2.0}
    close = gpu_curves._row("fp32", "triton", [4.0, 3.0002], [4.0, 3.0], seconds)
    assert "failed" not in close and close["at step"] == 2 and close["at step 1"] == 0
    assert "failed" in gpu_curves._row("fp32", "triton", [4.0, 3.03], [4.0, 3.0], seconds)
    assert "failed" in gpu_curves._row("fp32", "triton", [4.0, float("nan")], [4.0, 3.0], seconds)
