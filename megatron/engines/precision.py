"""Which precision a run computes in: said by the user, or measured once at step 0 and kept with the checkpoint."""

from __future__ import annotations

import dataclasses
import time

import torch

from megatron.config.errors import ConfigError, UnavailableError
from megatron.config.model_shape import ModelShape
from megatron.engines.base import PrecisionChoice
from megatron.kernels.choice import Kernels
from megatron.models.decoder import EAGER, Decoder
from megatron.models.initialise import initialise
from megatron.parallel.mesh import launched, local_device
from megatron.parallel.random import keyed_generator

COMPUTE_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
"""What forward and backward run in. Masters are float32 for bf16 and fp32, float64 for fp64."""

_PROBE_LAYERS = 2
_PROBE_ROUNDS = 3
_WORTH_IT = 0.95
"""bf16 is taken where its step lasts at most this share of fp32's: rounding is not accepted for nothing."""


def bf16_support(device: torch.device) -> str | None:
    """Why bf16 cannot run on the device, or None where it can."""
    if device.type == "cuda":
        return None if torch.cuda.is_bf16_supported(including_emulation=False) else "this GPU has no bfloat16"
    if not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN, and without it bfloat16 matrix products run element by element"
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU lacks the AVX-512 (or ARM bf16) instructions that oneDNN's bfloat16 needs"
    return None


def choose_precision(
    asked: str,
    shape: ModelShape,
    micro_batch: int,
    seq_length: int,
    device: torch.device | None = None,
    kernels: Kernels = EAGER,
) -> PrecisionChoice:
    """The precision for a run, with its reason in words and figures.

    asked "auto": on a GPU bf16; on CPU a forward and backward pass of the model's first two layers and its head is
    timed in fp32 and in bf16, and bf16 is taken where it pays. Neither torch's random state nor any weight is touched.
    device: default this process's.
    Raises UnavailableError where bf16 is asked for and cannot run.
    """
    device = device or local_device(launched().local_rank)
    if asked not in ("auto", *COMPUTE_DTYPES):
        raise ConfigError(f"train.precision {asked!r} is unknown: use auto, {', '.join(COMPUTE_DTYPES)}")
    obstacle = bf16_support(device) if asked in ("auto", "bf16") else None
    if asked != "auto":
        if obstacle:
            raise UnavailableError(f"train.precision bf16 cannot run: {obstacle}; set train.precision to fp32 or auto")
        return PrecisionChoice(asked, f"{asked}: asked for by train.precision")
    if obstacle:
        return PrecisionChoice("fp32", f"fp32: {obstacle}")
    if device.type == "cuda":
        return PrecisionChoice("bf16", "bf16: the GPU has it")
    times = _measure(shape, micro_batch, seq_length, kernels)
    name = "bf16" if times["bf16"] <= _WORTH_IT * times["fp32"] else "fp32"
    figures = ", ".join(f"{key} {value:.1f} ms" for key, value in times.items())
    size = f"{micro_batch} x {seq_length} tokens through {min(_PROBE_LAYERS, shape.num_hidden_layers)} layers"
    return PrecisionChoice(name, f"{name}: measured forward and backward of {size} and the head: {figures}", times)


def _measure(shape: ModelShape, micro_batch: int, seq_length: int, kernels: Kernels) -> dict[str, float]:
    """Best milliseconds of each precision, taken in turns so that a busy machine is unfair to neither."""
    probe = dataclasses.replace(shape, num_hidden_layers=min(_PROBE_LAYERS, shape.num_hidden_layers))
    generator = keyed_generator("precision probe")
    tokens = torch.randint(0, shape.vocab_size, (micro_batch, seq_length), generator=generator)
    documents = torch.zeros(micro_batch, seq_length, dtype=torch.int32)
    numbers = torch.arange(micro_batch)
    best: dict[str, float] = {}
    models: dict[str, Decoder] = {}
    for name in ("fp32", "bf16"):
        models[name] = Decoder(probe, kernels).to(COMPUTE_DTYPES[name])
        initialise(models[name], 0)
    for round_number in range(1 + _PROBE_ROUNDS):
        for name, model in models.items():
            started = time.perf_counter()
            model(tokens, documents, tokens, 1 / tokens.numel(), numbers)[0].backward()
            passed = 1000 * (time.perf_counter() - started)
            if round_number:  # the first round pays for memory and for oneDNN's kernels
                best[name] = min(passed, best.get(name, passed))
            model.zero_grad(set_to_none=True)
    return best
