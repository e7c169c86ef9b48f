"""Law C3: an export proves itself. The folder, loaded from disk by `transformers`, against our own model.

Same tokens, fp32, several lengths: the largest difference of the logits, of the negative log-likelihood, and how often
the greedy token agrees. Besides, every tensor of the folder is read back and compared bit for bit, since a prompt
touches only the embedding rows that it uses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.config.errors import CheckpointError, ProofError
from megatron.config.model_shape import ModelShape
from megatron.hf.import_weights import HuggingFaceTensors
from megatron.hf.transformers_door import load_model, model_logits, transformers_version

TOLERANCE = 1e-4
Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Comparison:
    """Two models on one prompt. `nll` in nats a token; `greedy_agreement` is a share of the positions."""

    text: str
    length: int
    largest_logit_difference: float
    nll_difference: float
    nll: float
    greedy_agreement: float


@dataclass(frozen=True)
class Proof:
    """The whole proof; `passed` is its verdict."""

    tolerance: float
    dtype: str
    comparisons: list[Comparison]
    tensors_compared: int
    transformers: str

    @property
    def largest_logit_difference(self) -> float:
        """Over all prompts; NaN where any logit is not finite."""
        differences = [item.largest_logit_difference for item in self.comparisons]
        return max(differences) if all(value == value for value in differences) else float("nan")

    @property
    def passed(self) -> bool:
        """False also for NaN."""
        return self.largest_logit_difference <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        """What proof.json holds."""
        return {
            "format": 1,
            "passed": self.passed,
            "largest_logit_difference": self.largest_logit_difference,
            **asdict(self),
        }


@dataclass(frozen=True)
class Prompt:
    """Token ids to compare on, and where they come from ("held-out python", "random ids")."""

    text: str
    tokens: list[int]


def prompts_from(texts: Mapping[str, Sequence[int]], shape: ModelShape, seed: int = 0) -> list[Prompt]:
    """Prompts of several lengths, 1 and the model's full length among them, cut from each text's tokens in turn.

    Texts that are too short are repeated. One more prompt of random ids reaches the rare rows of the embedding.
    """
    full = shape.max_position_embeddings
    lengths = sorted({1, min(2, full), min(17, full), max(1, full // 2), full})
    prompts: list[Prompt] = []
    named = [(name, list(tokens)) for name, tokens in texts.items() if len(tokens) > 0]
    for number, length in enumerate(lengths if named else []):
        chosen = named if length == full else [named[number % len(named)]]
        for name, tokens in chosen:
            prompts.append(Prompt(name, (tokens * (length // len(tokens) + 1))[:length]))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(shape.vocab_size, (full,), generator=generator).tolist()
    return [*prompts, Prompt("random ids", ids)]


def prove(
    folder: Path,
    logits: Logits,
    weights: Mapping[str, Tensor],
    shape: ModelShape,
    prompts: Sequence[Prompt],
    tolerance: float = TOLERANCE,
) -> Proof:
    """Compares the folder with our model. Raises ProofError for a damaged folder or a difference over `tolerance`.

    logits: our model, fp32: token ids [1, length] to logits [1, length, >= vocab_size].
    weights: what the folder must hold, by our names, in the folder's dtype, vocabulary padding of any value.
    """
    theirs = load_model(folder, torch.float32)
    comparisons = [_compare(prompt, logits, theirs, shape.vocab_size) for prompt in prompts]
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()}
    proof = Proof(tolerance, "/".join(sorted(dtypes)), comparisons, len(weights), transformers_version())
    if not proof.passed:
        worst = max(comparisons, key=lambda item: item.largest_logit_difference)
        raise ProofError(
            f"{folder}: parity proof failed: the largest logit difference to transformers {proof.transformers} is "
            f"{proof.largest_logit_difference:.3g} (tolerance {tolerance:g}), on {worst.length} tokens of {worst.text}"
        )
    _compare_tensors(folder, weights, shape)
    return proof


@torch.no_grad()
def _compare(prompt: Prompt, logits: Logits, theirs: torch.nn.Module, vocab_size: int) -> Comparison:
    tokens = torch.tensor([prompt.tokens], dtype=torch.int64)
    a = logits(tokens)[0, :, :vocab_size].float()
    b = model_logits(theirs, tokens)[0].float()
    if a.shape != b.shape:
        raise ProofError(f"logits differ in shape: ours {list(a.shape)}, of the exported folder {list(b.shape)}")
    nll = [float(_nll(values, tokens[0])) for values in (a, b)]
    agreement = (a.argmax(-1) == b.argmax(-1)).double().mean()
    difference = float((a - b).abs().max())
    return Comparison(prompt.text, len(prompt.tokens), difference, abs(nll[0] - nll[1]), nll[0], float(agreement))


def _nll(logits: Tensor, tokens: Tensor) -> Tensor:
    if len(tokens) == 1:
        return torch.zeros(())
    return torch.nn.functional.cross_entropy(logits[:-1].double(), tokens[1:])


def _compare_tensors(folder: Path, weights: Mapping[str, Tensor], shape: ModelShape) -> None:
    try:
        read = HuggingFaceTensors(folder, shape)
        for name, wanted in weights.items():
            rows = shape.vocab_size if name in ("embedding.weight", "head.weight") else wanted.shape[0]
            if not torch.equal(read.whole(name)[:rows], wanted[:rows]):
                raise ProofError(
                    f"{folder}: parity proof failed: tensor {name} read back differs from the checkpoint's"
                )
    except CheckpointError as error:
        raise ProofError(f"parity proof failed: {error}") from None
