"""How `gpu.py` fits a model's training step on one GPU: rows of a micro-batch, and how many layers are recomputed.

Estimates say what is tried first; whether it fits is seen when it runs out of memory, and then the next is tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gpu_models import activation_bytes

from megatron.config.model_shape import ModelShape

_MOST_TOKENS = 32768
"""Of a micro-batch: more make no product quicker."""

_USED = 0.94
_FIXED_BYTES = 5 << 30
"""Context, libraries' workspaces, logits of a chunk with their gradient, and what the allocator cannot use."""

_TOKENS_OVERHEAD = 256
"""What a micro-batch costs beyond its tokens, in tokens: gradients that are added up, and products that do not fill the
chip. A guess that orders trials, no more."""


@dataclass(frozen=True)
class Fit:
    """micro_batch: rows. recomputed: so many first layers keep nothing but their input. bytes: the estimate."""

    micro_batch: int
    recomputed: int
    bytes: float

    def words(self, layers: int) -> str:
        """What of the layers is recomputed."""
        return f"{self.recomputed} of {layers} layers" if self.recomputed else "none"


def state_bytes(shape: ModelShape, gradients: str, split: bool = False) -> int:
    """Of masters, moments, the copy that computes, and gradients: 16 bytes a parameter with narrow gradients, else 20,
    and 2 less with masters in halves (`megatron/engines/master_weights.py`)."""
    return shape.parameter_count() * ((16 if gradients == "bf16" else 20) - 2 * split)


def gradients_for(shape: ModelShape, memory: float, split: bool = False) -> str:
    """fp32, or bf16 where memory asks for it."""
    return "bf16" if state_bytes(shape, "fp32", split) > 0.8 * memory else "fp32"


def fits(shape: ModelShape, seq_length: int, memory: float, gradients: str, split: bool = False) -> Iterator[Fit]:
    """What to try, the quickest by estimate first; after one that ran out of memory only smaller ones come."""
    room = _USED * memory - _FIXED_BYTES - state_bytes(shape, gradients, split)
    found = [fit for fit in _all(shape, seq_length) if fit.bytes <= room]
    found = found or [min(_all(shape, seq_length), key=lambda fit: fit.bytes)]
    yield from sorted(found, key=lambda fit: _cost(fit, shape, seq_length))


def _all(shape: ModelShape, seq_length: int) -> list[Fit]:
    layers, each = shape.num_hidden_layers, activation_bytes(shape)
    made = []
    rows = max(1, _MOST_TOKENS // seq_length)
    while rows:
        for recomputed in (*range(0, layers, max(1, layers // 8)), layers):
            kept = (layers - recomputed) * each + recomputed * 2 * shape.hidden_size + (each if recomputed else 0)
            made.append(Fit(rows, recomputed, float(rows * seq_length * kept)))
        rows //= 2
    return made


def _cost(fit: Fit, shape: ModelShape, seq_length: int) -> float:
    """Time of a token, beside that of others: a recomputed layer runs forward twice."""
    tokens = fit.micro_batch * seq_length
    return (1 + fit.recomputed / shape.num_hidden_layers / 3) * (1 + _TOKENS_OVERHEAD / tokens)
