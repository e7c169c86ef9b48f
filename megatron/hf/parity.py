"""Law C3: an export proves itself. The folder, loaded from disk by `transformers`, against our own model.

Same tokens, float32, weights rounded as the folder has them: the largest difference of the logits, of the negative
log-likelihood, and how often the greedy token agrees, on prompts of several lengths, alone and in a padded batch; then
greedy generation with both key-value caches. Models that memory does not hold twice are compared layer by layer.
Besides, every tensor of the folder is read back and compared bit for bit, since a prompt touches only the embedding
rows that it uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from megatron.checkpoint.tensor_shards import TensorSource
from megatron.config.errors import ProofError, UnavailableError
from megatron.config.model_shape import ModelShape
from megatron.hf.cached_generation_proof import NEW_TOKENS, compare_generation, generation_prompts
from megatron.hf.layer_proof import LayeredModels
from megatron.hf.proof_memory import choose_extent
from megatron.hf.proof_prompts import Prompt
from megatron.hf.proof_record import TOLERANCE, LayerComparison, Proof
from megatron.hf.rebuilt_decoder import RoundedWeights, whole_decoder
from megatron.hf.tensor_comparison import compare_tensors
from megatron.hf.transformers_door import load_model
from megatron.hf.whole_proof import compare_alone, compare_padded
from megatron.models.decoding import CachedDecoder


def prove(
    folder: Path,
    source: TensorSource,
    shape: ModelShape,
    prompts: Sequence[Prompt],
    *,
    dtype: torch.dtype,
    tolerance: float = TOLERANCE,
    extent: str = "auto",
) -> Proof:
    """Compares the folder with our model. Raises ProofError for a damaged folder or a difference over `tolerance`.

    source: what the folder must hold, by our names, vocabulary padding of any value. dtype: of the folder, to which
    the source's weights are rounded. extent: "whole", "layers" or "auto", by the available memory.
    """
    compared, damage = _tensors(folder, source, dtype, shape)
    weights = RoundedWeights(source, dtype)
    longest = max(len(prompt.tokens) for prompt in prompts)
    chosen, reason = choose_extent(extent, shape, longest)
    compare = _by_layers if chosen == "layers" else _whole
    proof = replace(compare(folder, weights, shape, prompts, tolerance), reason=reason)
    if not proof.passed:
        if chosen == "whole":
            proof = replace(proof, layers=_layers_at_fault(folder, weights, shape, prompts))
        raise ProofError(_failure(folder, proof, damage))
    if damage:
        raise ProofError(damage)
    return replace(proof, tensors_compared=compared)


def _tensors(folder: Path, source: TensorSource, dtype: torch.dtype, shape: ModelShape) -> tuple[int, str]:
    """(how many are equal bit for bit, what is wrong with the first that is not): looked at before any model runs."""
    try:
        return compare_tensors(folder, source, dtype, shape), ""
    except ProofError as error:
        return 0, str(error)


def _whole(
    folder: Path, weights: RoundedWeights, shape: ModelShape, prompts: Sequence[Prompt], tolerance: float
) -> Proof:
    theirs, model = load_model(folder), whole_decoder(shape, weights)
    new_tokens = max(1, min(NEW_TOKENS, shape.max_position_embeddings // 2))
    chosen = generation_prompts(prompts, shape.max_position_embeddings, new_tokens)
    return Proof(
        tolerance,
        _name(weights.dtype),
        list(compare_alone(model, theirs, prompts)),
        "whole",
        padded=list(compare_padded(model, theirs, prompts)),
        generation=compare_generation(theirs, partial(CachedDecoder, model), chosen, new_tokens) if chosen else None,
    )


def _by_layers(
    folder: Path, weights: RoundedWeights, shape: ModelShape, prompts: Sequence[Prompt], tolerance: float
) -> Proof:
    models = LayeredModels(folder, weights, shape)
    layers, comparisons = models.compare(prompts)
    proof = Proof(tolerance, _name(weights.dtype), comparisons, "layers", layers=layers)
    if not proof.passed:  # generation would take as long again, and say less
        return proof
    return replace(proof, generation=models.compare_generation(prompts))


def _layers_at_fault(
    folder: Path, weights: RoundedWeights, shape: ModelShape, prompts: Sequence[Prompt]
) -> list[LayerComparison]:
    """What each layer does, where it can be seen: to say where a whole proof went wrong."""
    try:
        return LayeredModels(folder, weights, shape).compare(prompts)[0]
    except (UnavailableError, ProofError):  # the failure at hand is what is told
        return []


def _failure(folder: Path, proof: Proof, damage: str) -> str:
    """damage: what is wrong with the folder's files, which then is the cause, and is said first."""
    worst = max(
        (*proof.comparisons, *proof.padded),
        key=lambda item: (
            item.largest_logit_difference != item.largest_logit_difference,
            item.largest_logit_difference,
        ),
    )
    words = damage or f"{folder}: parity proof failed"
    words += (
        f"{'; ' if damage else ': '}the largest logit difference to transformers {proof.transformers} is "
        f"{proof.largest_logit_difference:.3g} (tolerance {proof.tolerance:g}), on {worst.length} tokens of "
        f"{worst.text}"
    )
    if proof.generation is not None and not proof.generation.passes(proof.tolerance):
        words += (
            f"; in cached generation it is {proof.generation.largest_logit_difference:.3g}, and "
            f"{len(proof.generation.partings)} greedy tokens differ"
        )
    if damage and all(layer.passes(proof.tolerance) for layer in proof.layers):
        return words
    return words + (f"; {_fault(proof.layers, proof.tolerance)}" if proof.layers else "")


def _fault(layers: Sequence[LayerComparison], tolerance: float) -> str:
    """The layers that differ when they read the same hidden states."""
    bad = [layer for layer in layers if not layer.passes(tolerance)]
    if not bad:
        return "every layer by itself agrees, so that the last norm or the head differs"
    named = ", ".join(f"{layer.layer} by {layer.own_difference:.3g}" for layer in bad[:4])
    if len(bad) >= len(layers) - 1 > 1:
        return f"every layer differs ({named}, …): config.json means another function than our model"
    if bad[0].layer == "embedding":
        return f"tokens come out differently of the embedding, by {bad[0].own_difference:.3g}"
    more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
    return f"the same hidden states come out differently of {'layer' if len(bad) == 1 else 'layers'} {named}{more}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
