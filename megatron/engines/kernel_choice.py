"""Which kernels a run uses: said by the user, or measured once at step 0 and kept with the checkpoint.

On a GPU whole layers are timed, forward and backward, with one operation changed at a time: what is fused with its
neighbours cannot be timed alone. On CPUs the definitions run, as benchmarks/step_cpu.py measured.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from megatron.config.errors import UnavailableError
from megatron.config.kernel_checks import ATTENTION_IN_GRAPHS
from megatron.config.model_shape import ModelShape
from megatron.config.schema import KernelsSection
from megatron.engines.base import KernelChoice
from megatron.engines.kernel_obstacles import OPERATIONS, backend_obstacle, obstacles
from megatron.kernels.attention import AttentionBackend
from megatron.kernels.attention_choice import AttentionCall, attention_call, attention_candidates
from megatron.kernels.choice import Backend, Kernels
from megatron.kernels.document_lengths import document_bounds
from megatron.kernels.matrix_product import Library, quicker_library
from megatron.models.compiled_layers import compile_layers
from megatron.models.decoder import Decoder
from megatron.models.joined import join
from megatron.parallel.mesh import launched, local_device
from megatron.parallel.random import keyed_generator

_PROBE_LAYERS = 2
_PROBE_ROUNDS = 7
_PROBE_TOKENS = 4096
_WORTH_IT = 0.98
"""Another kernel is taken where a step lasts at most this share of the one before: noise decides nothing."""

Asked = Mapping[str, Any]


def choose_kernels(
    section: KernelsSection,
    shape: ModelShape,
    dtype: torch.dtype,
    rows: tuple[int, int],
    no_compiling: str | None = None,
    gathered: bool = False,
    device: torch.device | None = None,
    measure: Callable[[Kernels], float] | None = None,
) -> KernelChoice:
    """The kernels of a run, with the reason in words and figures.

    dtype: what the model computes in. rows: (micro-batch, sequence length) that are timed. no_compiling: why the
    config allows no compiled layers; None where it does. gathered: whether context ranks gather keys. measure: seconds
    of a step of a probe with given kernels; default the clock of the device. What the config forbids is refused before
    (`config/kernel_checks.py`). Raises UnavailableError for what is asked for and cannot run.
    """
    device = device or local_device(launched().local_rank)
    asked = section.model_dump()
    what = {"documents": shape.document_mask, "gathered": gathered, "windowed": shape.window_bites()}
    call = attention_call(device, dtype, shape.head_dim, **what)
    _refuse(asked, call)
    if device.type != "cuda" and measure is None:
        product, figures = product_for(section, shape, dtype, rows)
        kernels = _fixed(asked, Kernels(product=product))
        kernels = dataclasses.replace(kernels, compile_layers=asked["compile"] == "layers")
        measured = ", ".join(f"by {name} {value:.3g} ms" for name, value in figures.items())
        words = "on CPUs the definitions run but where another is asked for"
        if figures:
            words += f"; matrix products by {product}: a linear map took {measured}"
        return KernelChoice(dataclasses.asdict(kernels), _said(asked, words), figures)
    start = dataclasses.replace(
        _fixed(asked, Kernels(attention=_first_attention(device))),
        compile_layers=asked["compile"] == "layers" or (asked["compile"] == "auto" and no_compiling is None),
    )
    measure = measure or _Probe(shape, dtype, rows, device).seconds
    return _descend(start, list(_changes(asked, start, call)), measure, asked)


def _refuse(asked: Asked, call: AttentionCall) -> None:
    for found in obstacles(asked, call):
        raise UnavailableError(f"{found}; set kernels.{found.key} to {found.instead}")


def product_for(
    section: KernelsSection, shape: ModelShape, dtype: torch.dtype, rows: tuple[int, int]
) -> tuple[Library, dict[str, float]]:
    """Whose matrix products run on CPUs, and the milliseconds of either where they were measured (once a process)."""
    if section.product != "auto":
        return section.product, {}
    if dtype != torch.float32:
        return "torch", {}
    return quicker_library(min(rows[0] * rows[1], _PROBE_TOKENS), shape.hidden_size, shape.intermediate_size)


def _fixed(asked: Asked, others: Kernels) -> Kernels:
    """The kernels with everything that is asked for by name."""
    named = {key: asked[key] for key in (*OPERATIONS, "attention") if asked[key] != "auto"}
    flags = {key: asked[key] for key in ("fp8", "cuda_graphs", "weight_gradients")}
    return dataclasses.replace(others, **flags, **named)


def _first_attention(device: torch.device) -> AttentionBackend:
    return "blockwise" if device.type == "cpu" else "sdpa"


def _changes(asked: Asked, start: Kernels, call: AttentionCall) -> Iterator[tuple[str, Any]]:
    """What is tried besides the start, one field after the other."""
    backends: list[Backend] = [name for name in get_args(Backend) if backend_obstacle(name, call.device) is None]
    for operation in OPERATIONS:
        if asked[operation] == "auto":
            for backend in backends:
                if (operation, backend) != ("cross_entropy", "compile") and backend != getattr(start, operation):
                    yield operation, backend
    if asked["attention"] == "auto":
        for attention in attention_candidates(call):
            if attention != start.attention and (not asked["cuda_graphs"] or attention in ATTENTION_IN_GRAPHS):
                yield "attention", attention
    if asked["compile"] == "auto" and start.compile_layers:
        yield "compile_layers", False


def _descend(
    start: Kernels, changes: list[tuple[str, Any]], measure: Callable[[Kernels], float], asked: Asked
) -> KernelChoice:
    """Changes one field at a time and keeps what is quicker. What fails is passed over, and said."""
    failed: list[str] = []
    try:
        best, seconds = start, measure(start)
    except Exception as error:
        if not start.compile_layers or asked["compile"] != "auto":
            raise
        failed.append(_failure("compiled layers", error))
        best = dataclasses.replace(start, compile_layers=False)
        seconds = measure(best)
    figures = {"start": 1000 * seconds}
    for field, value in changes:
        tried = dataclasses.replace(best, **{field: value})
        try:
            took = measure(tried)
        except Exception as error:
            failed.append(_failure(f"{field} {value}", error))
            continue
        figures[f"{field} {value}"] = 1000 * took
        if took <= _WORTH_IT * seconds:
            best, seconds = tried, took
    words = ", ".join(f"{name} {value:.2f} ms" for name, value in figures.items())
    reason = _said(asked, f"measured a step of {_PROBE_LAYERS} layers and the head: {words}")
    return KernelChoice(dataclasses.asdict(best), "; ".join([reason, *failed]), figures)


def _failure(what: str, error: Exception) -> str:
    said = str(error).strip().splitlines()
    return f"{what} failed ({type(error).__name__}{': ' * bool(said)}{said[0] if said else '':.80})"


def _said(asked: Asked, why: str) -> str:
    named = [key for key in (*OPERATIONS, "attention", "product", "compile") if asked[key] != "auto"]
    named += [key for key in ("cuda_graphs", "fp8") if asked[key]]
    named += ["weight_gradients"] * (asked["weight_gradients"] != "separate")
    return f"{', '.join(named)} as asked for; {why}" if named else why


class _Probe:
    """A decoder of few layers on the device: the seconds of its forward and backward pass with given kernels."""

    def __init__(self, shape: ModelShape, dtype: torch.dtype, rows: tuple[int, int], device: torch.device) -> None:
        self._shape = dataclasses.replace(shape, num_hidden_layers=min(_PROBE_LAYERS, shape.num_hidden_layers))
        self._dtype, self._device = dtype, device
        generator = keyed_generator("kernel probe")
        self._tokens = torch.randint(0, shape.vocab_size, rows, generator=generator).to(device)
        documents = (torch.arange(rows[1]) >= rows[1] // 3).int().expand(rows).contiguous()
        self._bounds, self._documents = document_bounds(documents), documents.to(device)
        self._numbers = torch.arange(rows[0], device=device)

    def seconds(self, kernels: Kernels) -> float:
        """Median, after the calls that compile. The model is put together as one process's is."""
        with torch.device(self._device):
            model = Decoder(self._shape, kernels).to(self._dtype)
        drawn = torch.Generator(self._device).manual_seed(0)  # the run's own random state stays as it is
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, self._shape.initializer_range, generator=drawn)
        model.bounds = self._bounds
        if not kernels.fp8 and launched().world_size == 1:
            join(model)
        if kernels.compile_layers:
            compile_layers(model)
        try:
            return self._median(model)
        finally:
            if self._device.type == "cuda":
                # Programs count by the code that they are of: those of probes would leave the run's own no room.
                torch.compiler.reset()

    def _median(self, model: Decoder) -> float:
        times = []
        for number in range(3 + _PROBE_ROUNDS):
            model.zero_grad(set_to_none=True)
            self._synchronise()
            begin = time.perf_counter()
            self._step(model)
            self._synchronise()
            if number >= 3:
                times.append(time.perf_counter() - begin)
        return statistics.median(times)

    def _step(self, model: Decoder) -> None:
        total: Tensor = model(self._tokens, self._documents, self._tokens, 1 / self._tokens.numel(), self._numbers)[0]
        total.sum().backward()

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
