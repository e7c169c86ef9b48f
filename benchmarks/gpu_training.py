"""Part d: decoders trained by the engine, as a run trains them, and through the real loader."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_ceilings import PEAK_BF16, ceilings_of
from gpu_job import Context, Job, free_memory, synchronise
from gpu_layouts import Fit, fits, gradients_for
from gpu_models import published_words, shape_of, utilisation
from gpu_profile import profiled
from gpu_results import Row
from microbatch import Micro
from torch import Tensor

from megatron.config.kernel_checks import ATTENTION_IN_GRAPHS, compiling_obstacle
from megatron.config.model_shape import ModelShape
from megatron.config.schema import KernelsSection, OptimizerSection, ParallelSection, TrainSection
from megatron.engines.base import Engine, LaunchedStep, MicrobatchLike
from megatron.engines.build import build_engine, default_kernels
from megatron.engines.kernel_choice import choose_kernels
from megatron.engines.model_parts import whole_parameters
from megatron.engines.torch_engine import TorchEngine
from megatron.kernels.choice import Kernels

TITLE = "training"
NOTES = (
    "bf16 with float32 masters, AdamW, clipping; random tokens, medians of whole steps by CUDA events, launched as the "
    "trainer does. MFU: c counts 6N + 6LdT operations a token, n counts 6N + 12LdT (benchmarks/gpu_models.py), of 989 "
    "TFLOP/s and of part a's best product. documents: of a row; attention never crosses them. published: figures of "
    "others for the model that comes nearest, as they gave them, on their hardware."
)


UNSAID = ("kernels", "gradients", "parameters", "steps", "ready after s", "out of memory before", "published")
"""Columns that are in the files and not in the lines on the terminal."""


@dataclass(frozen=True)
class Case:
    """loader: through the trainer with its loader, hooks and metrics, but without checkpoints. optimizer: whose kernel
    runs AdamW. split: masters in halves. graphs: CUDA graphs. fused: weight gradients added in their products.
    definitions: by the eager definitions, whatever was chosen."""

    preset: str
    seq_length: int
    documents: int = 1
    loader: bool = False
    fp8: bool = False
    optimizer: str = "torch"
    split: bool = False
    graphs: bool = False
    fused: bool = False
    definitions: bool = False

    @property
    def name(self) -> str:
        """ "llama-1b, T 2048, 4 documents"."""
        words = f"{self.preset}, T {self.seq_length}"
        words += f", {self.documents} documents" if self.documents > 1 else ""
        words += f", {self.optimizer} AdamW" if self.optimizer != "torch" else ""
        words += ", split masters" * self.split + ", loader" * self.loader + ", fp8" * self.fp8
        words += ", CUDA graphs" * self.graphs + ", fused weight gradients" * self.fused
        return words + ", definitions" * self.definitions

    @property
    def optimizer_section(self) -> OptimizerSection:
        """[optimizer]."""
        masters = "split" if self.split else "whole"
        return OptimizerSection.model_validate({"implementation": self.optimizer, "master_weights": masters})

    def kernels(self, chosen: dict[str, Any]) -> dict[str, Any]:
        """The kernels that were chosen, but for what the case is about and what does not go with it."""
        kernels = chosen | {"fp8": self.fp8, "cuda_graphs": self.graphs}
        if self.graphs and kernels["attention"] not in ATTENTION_IN_GRAPHS:
            kernels["attention"] = ATTENTION_IN_GRAPHS[0]
        if self.fused:
            kernels["weight_gradients"] = "fused"
        return kernels


CASES = (
    Case("llama-1b", 2048),
    Case("llama-8b", 8192),
    Case("llama-600m", 1024),
    Case("llama-3b", 2048),
    Case("llama-1b", 2048, loader=True),
    Case("llama-1b", 2048, optimizer="triton"),
    Case("llama-8b", 8192, optimizer="triton", split=True),
    Case("llama-600m", 2048),
    Case("llama-600m", 2048, graphs=True),
    Case("llama-1b", 2048, fused=True),
    Case("llama-8b", 2048),
    Case("llama-1b", 1024),
    Case("llama-1b", 2048, documents=4),
    Case("llama-1b", 8192),
    Case("llama-3b", 1024),
    Case("llama-8b", 1024),
    Case("llama-8b", 8192, fp8=True),
    Case("llama-1b", 2048, definitions=True),
    Case("llama-3b", 8192),
    Case("llama-600m", 8192),
    Case("llama-8b", 8192, documents=8),
)
"""The most telling first: a part that is cut short leaves the last ones out."""

_DRY = (
    Case("llama-1b", 2048),
    Case("llama-8b", 8192, optimizer="triton", split=True),
    Case("llama-1b", 2048, documents=4, graphs=True),
    Case("llama-1b", 2048, loader=True, fused=True),
)
_STEP_SECONDS = 2.0
_TIMED_SECONDS = 10.0
_ROUNDS = (4, 12)


@dataclass(frozen=True)
class Setting:
    """A case with its sizes decided. micro_batches: of a step. kernels: fields of `Kernels`."""

    case: Case
    shape: ModelShape
    seq_length: int
    fit: Fit
    gradients: str
    micro_batches: int
    kernels: dict[str, Any]

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.micro_batches * self.fit.micro_batch * self.seq_length

    @property
    def parallel(self) -> dict[str, Any]:
        """[parallel]."""
        return {"recompute": "full", "recompute_layers": self.fit.recomputed} if self.fit.recomputed else {}


def jobs(context: Context) -> Iterator[Job]:
    """The kernels' choice, unless it was made on this device today, then every case with it."""
    if context.arguments.choose_again or not _choices(context):
        yield Job("choice", lambda: [_choice_row(context, "llama-1b")])
    else:
        print(f"kernels as this day's first run of part d chose them: {_choices(context)[-1]['reason']}", flush=True)
    for case in _DRY if context.dry else CASES:
        yield Job(case.name, partial(run_case, context, case))


def run_case(context: Context, case: Case) -> Sequence[Row]:
    """A row: the first fit that does not run out of memory."""
    free_memory(context.device)
    length = max(4, case.seq_length // 1024) if context.dry else case.seq_length
    shape = shape_of(case.preset, length, context.dry)
    memory = 1e12 if context.dry else float(torch.cuda.get_device_properties(context.device).total_memory)
    gradients = "bf16" if context.dry and case.preset == "llama-8b" else gradients_for(shape, memory, case.split)
    kernels = dict(vars(default_kernels(context.device))) if case.definitions else _kernels(context)
    tried: list[Fit] = []
    for fit in fits(shape, length, memory, gradients, case.split):
        if tried and fit.bytes > 0.9 * tried[-1].bytes:
            continue
        if context.dry:
            fit = Fit(2, 1 if gradients == "bf16" else 0, 0.0)
        micro_batches = 2 if context.dry else _micro_batches(shape, length, fit)
        setting = Setting(case, shape, length, fit, gradients, micro_batches, case.kernels(kernels))
        try:
            return [_row(context, setting, _measured(context, setting), tried)]
        except torch.OutOfMemoryError:
            tried.append(fit)
        free_memory(context.device)
    return [{"model": case.preset, "T": length, "failed": f"out of memory with every one of {len(tried)} fits"}]


def _measured(context: Context, setting: Setting) -> dict[str, Any]:
    if setting.case.loader:
        from gpu_loader import train_through_loader

        return train_through_loader(context, setting)
    return _train(context, setting)


def _micro_batches(shape: ModelShape, seq_length: int, fit: Fit) -> int:
    """Of a step that lasts about two seconds at half of the peak, so that the update weighs as little as in a run."""
    tokens = _STEP_SECONDS * PEAK_BF16 / 2 / shape.flops_per_token(seq_length)
    return max(1, round(tokens / (fit.micro_batch * seq_length)))


def build(context: Context, setting: Setting) -> Engine:
    """The engine, with random weights drawn on the device. A dry run's records no graph: there is none on CPUs."""
    rows = setting.fit.micro_batch
    train = TrainSection(
        global_batch_size=rows * setting.micro_batches,
        micro_batch_size=rows,
        precision="bf16",
        gradients=setting.gradients,  # type: ignore[arg-type]
    )
    engine = build_engine(
        setting.shape,
        setting.case.optimizer_section,
        ParallelSection(**setting.parallel),
        train,
        context.seed,
        "bf16",
        weights=DrawnWeights(setting.shape, context),
        kernels=Kernels(**setting.kernels),
    )
    if setting.case.graphs and context.dry:
        assert isinstance(engine, TorchEngine)
        engine.use_graphs(_not_recorded)
    return engine


def _not_recorded(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """In the place of `cuda_capture`: what is replayed is the first microbatch's result."""
    losses = call()
    return lambda: None, losses


def _train(context: Context, setting: Setting) -> dict[str, Any]:
    """Seconds of a step, its loss, and the peak of memory."""
    begin = time.perf_counter()
    engine = build(context, setting)
    batches = [_batch(context, setting, number) for number in range(2)]
    warm = _steps(engine, batches, 1 if context.dry else 3, context.device)
    ready = time.perf_counter() - begin
    rounds = 1 if context.dry else max(_ROUNDS[0], min(_ROUNDS[1], int(_TIMED_SECONDS / max(warm[0][-1], 1e-3))))
    seconds, losses = _steps(engine, batches, rounds, context.device)
    if context.arguments.profile == setting.case.name or (context.dry and setting.case == _DRY[0]):
        profiled(context, setting.case.name, lambda: _steps(engine, batches, 1, context.device))
    return {
        "seconds": statistics.median(seconds),
        "steps": len(seconds),
        "ready": ready,
        "loss": losses[-1],
        "words": engine.describe()["kernels"],
    }


def _steps(
    engine: Engine, batches: Sequence[Sequence[MicrobatchLike]], steps: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """Seconds and losses of so many steps, each looked at when the next one is launched."""
    marks, launched, results = [_now(device)], [], []
    for number in range(steps):
        launched.append(engine.launch_step(batches[number % len(batches)], 1e-4))
        marks.append(_now(device))
        if number:
            results.append(_looked_at(launched[number - 1]))
    results.append(_looked_at(launched[-1]))
    synchronise(device)
    return [_between(a, b) for a, b in zip(marks[:-1], marks[1:], strict=True)], results


def _looked_at(step: LaunchedStep) -> float:
    result = step.result()
    if not result.updated:
        raise RuntimeError(f"a step made no update: {result.reason}")
    return result.loss


def _now(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(begin: Any, end: Any) -> float:
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000


def _batch(context: Context, setting: Setting, number: int) -> list[MicrobatchLike]:
    """Random tokens in page-locked memory, as the loader gives them."""
    generator = torch.Generator().manual_seed(context.seed + number)
    rows, length = setting.fit.micro_batch, setting.seq_length
    places = torch.arange(length, dtype=torch.int32).expand(rows, length)
    documents = (places * setting.case.documents // length).contiguous()
    batch: list[MicrobatchLike] = []
    for _ in range(setting.micro_batches):
        tokens = torch.randint(setting.shape.vocab_size, (rows, length + 1), generator=generator)
        parts = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), documents, torch.arange(rows) % 2)
        tensors = (*parts, torch.arange(rows))
        batch.append(Micro(*(x.pin_memory() if context.cuda else x for x in tensors)))
    return batch


class DrawnWeights:
    """A TensorSource of normal numbers that are drawn on the device: the trainer draws its own on the CPU, which takes
    minutes for 8 billion. Norms are ones."""

    def __init__(self, shape: ModelShape, context: Context) -> None:
        self._tensors = whole_parameters(shape)
        self._device, self._deviation = context.device, shape.initializer_range
        self._generator = torch.Generator(context.device).manual_seed(context.seed)

    def names(self) -> Iterable[str]:
        """Every parameter of the whole model."""
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Of what is drawn."""
        return torch.float32

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """A box, drawn anew at each call."""
        made = torch.empty(*shape, device=self._device)
        return made.fill_(1.0) if made.ndim == 1 else made.normal_(0.0, self._deviation, generator=self._generator)


def _row(context: Context, setting: Setting, found: dict[str, Any], tried: Sequence[Fit]) -> Row:
    case, shape = setting.case, setting.shape
    pace = setting.tokens / found["seconds"]
    of_peak = utilisation(shape, setting.seq_length, pace, PEAK_BF16)
    of_gemm = utilisation(shape, setting.seq_length, pace, ceilings_of(context).gemm)
    return {
        "model": case.preset + ", fp8" * case.fp8 + ", CUDA graphs" * case.graphs + ", fused gradients" * case.fused,
        "from": "the loader" if case.loader else "random tokens",
        "T": setting.seq_length,
        "documents": case.documents,
        "tokens/s": round(pace),
        "MFU of 989": of_peak.words(),
        "MFU of the best product": of_gemm.words(),
        "peak GiB": torch.cuda.max_memory_allocated(context.device) / 2**30 if context.cuda else None,
        "micro-batch": setting.fit.micro_batch,
        "tokens a step": setting.tokens,
        "recomputed": setting.fit.words(shape.num_hidden_layers),
        "gradients": setting.gradients,
        "AdamW": case.optimizer + ", split masters" * case.split,
        "parameters": shape.parameter_count(),
        "step s": found["seconds"],
        "steps": found["steps"],
        "ready after s": found["ready"],
        "loss": found["loss"],
        "kernels": found["words"],
        "out of memory before": "; ".join(f"{f.micro_batch} rows, {f.words(shape.num_hidden_layers)}" for f in tried),
        "published": published_words(case.preset, case.seq_length),
    }


def _choice_row(context: Context, preset: str) -> Row:
    """What the trainer's own measurement at step 0 takes, for one model; all cases then run with it."""
    length = 8 if context.dry else 2048
    shape = shape_of(preset, length, context.dry)
    begin = time.perf_counter()
    choice = choose_kernels(
        KernelsSection(),
        shape,
        torch.bfloat16,
        (2 if context.dry else 4, length),
        no_compiling=compiling_obstacle(ParallelSection(), shape),
        device=context.device,
        measure=_pretended if context.dry else None,
    )
    fields = {key: str(value) for key, value in choice.kernels.items()}
    return {"model": preset, "T": length, "reason": choice.reason, "seconds": time.perf_counter() - begin} | fields


def _pretended(kernels: Kernels) -> float:
    """A dry run has the Triton kernels win, so that they are what it trains with."""
    fields = (kernels.norm, kernels.rope, kernels.activation, kernels.cross_entropy)
    return 0.9 ** fields.count("triton")


def _choices(context: Context) -> list[Row]:
    return [row for row in context.results.rows_here("d") if row["job"] == "choice" and "reason" in row]


def _kernels(context: Context) -> dict[str, Any]:
    """The choice that was measured on this device today; the definitions where there is none."""
    kernels = dict(vars(default_kernels(context.device)))
    for key, said in _choices(context)[-1].items() if _choices(context) else ():
        if key in kernels:
            kernels[key] = {"True": True, "False": False}.get(said, said)
    return kernels
