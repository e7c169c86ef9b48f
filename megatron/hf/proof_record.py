"""What a parity proof found, and its verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from megatron.hf.transformers_door import transformers_version

TOLERANCE = 1e-4
Extent = Literal["whole", "layers"]


@dataclass(frozen=True)
class Comparison:
    """Two models on one prompt. `nll` in nats a token, of ours; `greedy_agreement` is a share of the positions."""

    text: str
    length: int
    largest_logit_difference: float
    nll_difference: float
    nll: float
    greedy_agreement: float


@dataclass(frozen=True)
class LayerComparison:
    """Hidden states behind one layer; "embedding" is what the first layer reads.

    difference: the largest, when both models run from the tokens. own_difference: when ours is given what theirs gave
    this layer, so that no other layer has a part in it. largest: the largest hidden state of theirs, which
    differences of float32 grow with.
    """

    layer: str
    difference: float
    own_difference: float
    largest: float

    def passes(self, tolerance: float) -> bool:
        """By its own difference, against the size of the hidden states where that is above 1; False for NaN."""
        return self.own_difference <= tolerance * max(1.0, self.largest)


@dataclass(frozen=True)
class Parting:
    """Where greedy tokens part: the prompt, the new token's number, both choices, and how far our own two logits for
    them are apart."""

    prompt: str
    step: int
    ours: int
    theirs: int
    gap: float


@dataclass(frozen=True)
class GenerationComparison:
    """Greedy tokens with each model's own key-value cache, all prompts in one batch, padded on transformers' side.

    Behind a parting both go on with transformers' token, so that every step is compared.
    """

    prompts: list[int]
    """Their lengths."""
    new_tokens: int
    agreeing: int
    largest_logit_difference: float
    partings: list[Parting]

    def passes(self, tolerance: float) -> bool:
        """Logits within the tolerance, so that choices part only between logits that are as near; False for NaN."""
        near = all(parting.gap <= 2 * tolerance for parting in self.partings)
        return near and self.largest_logit_difference <= tolerance


@dataclass(frozen=True)
class Proof:
    """The whole proof; `passed` is its verdict.

    extent: "whole" models side by side, or "layers" one after the other, and why. comparisons: each prompt alone (of
    layers: in one batch). padded: prompts in one batch, padded on the left. layers: of "layers", or of a whole proof
    that missed.
    """

    tolerance: float
    dtype: str
    comparisons: list[Comparison]
    extent: Extent = "whole"
    reason: str = ""
    padded: list[Comparison] = field(default_factory=list)
    generation: GenerationComparison | None = None
    layers: list[LayerComparison] = field(default_factory=list)
    tensors_compared: int = 0
    transformers: str = field(default_factory=transformers_version)

    @property
    def largest_logit_difference(self) -> float:
        """Over all prompts; NaN where any logit is not finite."""
        return _largest([item.largest_logit_difference for item in (*self.comparisons, *self.padded)])

    @property
    def passed(self) -> bool:
        """False also for NaN."""
        generated = self.generation is None or self.generation.passes(self.tolerance)
        alike = all(layer.passes(self.tolerance) for layer in self.layers)
        return self.largest_logit_difference <= self.tolerance and generated and alike

    def to_json(self) -> dict[str, Any]:
        """What proof.json holds."""
        verdict = {"passed": self.passed, "largest_logit_difference": self.largest_logit_difference}
        return {"format": 2, **verdict, **asdict(self)}


def _largest(differences: Sequence[float]) -> float:
    """The largest, NaN where there is one."""
    return max(differences) if all(value == value for value in differences) else float("nan")
