"""What `[kernels]` asks for and the rest of the config forbids, on every machine. Free of torch, as a plan is.

What another machine could run is found by `engines/kernel_obstacles.py`, where the run begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from megatron.config.errors import ConfigError
from megatron.config.layout_sizes import gathers_keys
from megatron.config.model_shape import ModelShape
from megatron.config.schema import KernelsSection, ParallelSection, TrainSection

SPLIT_BACKWARD = ("zero-bubble", "zbv")
"""Schedules of pipelines that compute gradients of inputs and of weights apart."""

ATTENTION_IN_GRAPHS = ("sdpa", "flex")
"""Attentions whose launches do not depend on how many documents there are, so that a CUDA graph can repeat them."""

WHOLE_DOCUMENTS = ("varlen", "cudnn")
"""Attentions that know documents, and no sliding window."""


class _Bounds(NamedTuple):
    """Of an attention's kernels. dtypes: in torch's words. Head sizes are multiples of `multiple`."""

    dtypes: tuple[str, ...]
    smallest: int
    largest: int | None
    multiple: int


_HALF = ("bfloat16", "float16")
_ATTENTION = {
    "varlen": _Bounds(_HALF, 8, 256, 8),
    "cudnn": _Bounds(_HALF, 8, 128, 8),
    "flex": _Bounds((*_HALF, "float32"), 16, None, 1),
}
_DTYPES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16"}


def kernel_refusals(
    kernels: KernelsSection,
    section: ParallelSection,
    processes: int,
    shape: ModelShape,
    train: TrainSection,
    precision: str,
) -> Iterator[ConfigError]:
    """All of `[kernels]` that the rest of the config forbids. processes: all of them. precision: the resolved name, or
    train.precision, where "auto" refuses nothing."""
    if kernels.compile == "layers" and (why := compiling_obstacle(section, shape)):
        yield ConfigError(f"kernels.compile = layers is not possible: {why}; set kernels.compile to auto or none")
    if kernels.cuda_graphs:
        yield from _graph_refusals(kernels, section, processes, train, precision)
    if kernels.weight_gradients == "fused":
        yield from _fused_refusals(kernels, section, processes, train, precision)
    if kernels.fp8 and processes > 1:
        yield ConfigError(
            f"kernels.fp8 = true is for one process, and there are {processes}: a tensor's one scale is that of what a "
            "process holds of it, so that the layout would change the loss curve; leave it out"
        )
    name = kernels.attention
    gathered, windowed = gathers_keys(section, shape), shape.window_bites()
    if why := attention_limit(name, _DTYPES.get(precision), shape.head_dim, gathered, windowed):
        yield ConfigError(f"kernels.attention = {name} is not possible: {why}; set kernels.attention to auto")


def check_kernels(
    kernels: KernelsSection,
    section: ParallelSection,
    processes: int,
    shape: ModelShape,
    train: TrainSection,
    precision: str,
) -> None:
    """Raises the first of `kernel_refusals`."""
    for refusal in kernel_refusals(kernels, section, processes, shape, train, precision):
        raise refusal


def compiling_obstacle(section: ParallelSection, shape: ModelShape) -> str | None:
    """Why layers cannot be compiled one by one; None where they can."""
    if section.engine != "torch":
        return f"parallel.engine = {section.engine} was never compared with compiled layers"
    if shape.hidden_dropout:
        return "model.hidden_dropout is keyed by the layer's number, so that every layer would be a program of its own"
    if splits_backward(section):
        return f"parallel.schedule = {section.schedule} splits the backward pass, and so runs a layer's graph twice"
    if (section.recompute, section.recompute_policy) == ("selective", "operations"):
        return "parallel.recompute_policy = operations sees no operations inside a compiled layer"
    return None


def splits_backward(section: ParallelSection) -> bool:
    """Whether gradients of inputs and of weights are computed apart."""
    return section.pipeline > 1 and section.schedule in SPLIT_BACKWARD


def attention_limit(
    backend: str, dtype: str | None, head_dim: int, gathered: bool, windowed: bool = False
) -> str | None:
    """Why an attention can compute this on no machine; None where some machine can. dtype: in torch's words, None where
    it is not known yet. gathered: whether queries are some positions, and keys all. windowed: whether a sliding window
    hides positions."""
    if backend in WHOLE_DOCUMENTS and windowed:
        return "it takes whole documents, and model.sliding_window is shorter than the sequences"
    if backend == "cudnn" and gathered:
        return "its causal mask needs all of a document's queries on one rank, and keys are gathered over context ranks"
    if (bounds := _ATTENTION.get(backend)) is None:
        return None
    if dtype is not None and dtype not in bounds.dtypes:
        return f"its kernels compute in {', '.join(bounds.dtypes)}, and attention here in {dtype}"
    if head_dim < bounds.smallest or (bounds.largest and head_dim > bounds.largest) or head_dim % bounds.multiple:
        sizes = f"from {bounds.smallest}" + (f" to {bounds.largest}" if bounds.largest else "")
        steps = f" in steps of {bounds.multiple}" if bounds.multiple > 1 else ""
        return f"its kernels have head sizes {sizes}{steps}, and head_dim is {head_dim}"
    return None


def _beside_wide_gradients(
    section: ParallelSection, processes: int, train: TrainSection, precision: str
) -> dict[str, bool]:
    """What keeps a run from being one process of the torch engine that adds bf16 gradients to fp32 ones."""
    return {
        f"{processes} processes": processes > 1,
        f"parallel.engine = {section.engine}": section.engine != "torch",
        f"precision {precision}": precision not in ("bf16", "auto"),
        f"train.gradients = {train.gradients}": train.gradients != "fp32",
    }


def _graph_refusals(
    kernels: KernelsSection, section: ParallelSection, processes: int, train: TrainSection, precision: str
) -> Iterator[ConfigError]:
    """CUDA graphs are for what runs alike every time on one process, and add narrow gradients to wide ones."""
    asked = {
        **_beside_wide_gradients(section, processes, train, precision),
        f"kernels.attention = {kernels.attention}": kernels.attention not in ("auto", *ATTENTION_IN_GRAPHS),
    }
    if against := [words for words, found in asked.items() if found]:
        yield ConfigError(
            f"kernels.cuda_graphs = true does not go with {' and '.join(against)}: it is for one process of the torch "
            f"engine in bf16 with fp32 gradients and attention by {' or '.join(ATTENTION_IN_GRAPHS)}; leave it out"
        )


def _fused_refusals(
    kernels: KernelsSection, section: ParallelSection, processes: int, train: TrainSection, precision: str
) -> Iterator[ConfigError]:
    """A product adds to a float32 sum that lies here as a plain tensor, and is told whether it is the step's first."""
    asked = {
        **_beside_wide_gradients(section, processes, train, precision),
        "kernels.cuda_graphs = true": kernels.cuda_graphs,
        "kernels.fp8 = true": kernels.fp8,
    }
    if against := [words for words, found in asked.items() if found]:
        yield ConfigError(
            f"kernels.weight_gradients = fused does not go with {' and '.join(against)}: it is for one process of the "
            "torch engine in bf16 with fp32 gradients, without CUDA graphs and fp8; set kernels.weight_gradients to "
            "separate"
        )
