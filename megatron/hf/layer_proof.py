"""Both models one layer at a time, for models that memory does not hold twice; it also names the layer at fault.

transformers runs its own whole forward pass with its layers on the disk, all prompts in one batch padded on the right;
hidden states behind each layer are kept, of the prompts' tokens alone. Then ours runs, each layer with its weights read
for it: once on its own hidden states, and once on those that transformers gave that layer, so that a difference is its
own. About two layers, embedding and head are in memory, and the hidden states of a few hundred tokens for each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron.config.errors import ProofError
from megatron.config.model_shape import ModelShape
from megatron.hf.cached_generation_proof import compare_generation, generation_prompts
from megatron.hf.proof_memory import give_back_freed
from megatron.hf.proof_prompts import LAYERS_LONGEST, Prompt, padded_right, shortened
from megatron.hf.proof_record import Comparison, GenerationComparison, LayerComparison
from megatron.hf.rebuilt_decoder import RoundedWeights, layered_decoder, stream_layers
from megatron.hf.transformers_door import decoder_layers, final_hidden, head_logits, load_model
from megatron.hf.whole_proof import compare_logits, final_hidden_of
from megatron.models.decoder import DecoderLayer
from megatron.models.decoding import CachedDecoder

NEW_TOKENS = 3
"""Each is a pass over all layers, read from the disk."""


@dataclass
class _Hidden:
    """Hidden states of the tokens that `mask` [batch, length] keeps: what layer 0 reads, then what each layer gives."""

    mask: Tensor
    states: list[Tensor] = field(default_factory=list)

    def keep(self, states: Tensor) -> None:
        self.states.append(states[self.mask])

    def padded(self, number: int) -> Tensor:
        """[batch, length, hidden], 0 in padding."""
        kept = self.states[number]
        whole = kept.new_zeros(*self.mask.shape, kept.shape[-1])
        whole[self.mask] = kept
        return whole


class LayeredModels:
    """Both models, with embedding, last norm and head in memory and layers on the disk."""

    def __init__(self, folder: Path, weights: RoundedWeights, shape: ModelShape) -> None:
        """Raises ProofError where transformers refuses the folder or has another number of layers, UnavailableError
        where it lacks what it needs for layers on the disk.
        """
        self.theirs: Any = load_model(folder, layers_on_disk=True)
        if (layers := len(decoder_layers(self.theirs))) != shape.num_hidden_layers:
            raise ProofError(f"{folder}: transformers has {layers} layers, our model {shape.num_hidden_layers}")
        self.ours, self.weights = layered_decoder(shape, weights), weights

    @torch.no_grad()
    def compare(self, prompts: Sequence[Prompt]) -> tuple[list[LayerComparison], list[Comparison]]:
        """Hidden states of the embedding and of every layer, and the logits of every prompt."""
        prompts = shortened(prompts, LAYERS_LONGEST)
        tokens, lengths = padded_right(prompts)
        mask = torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]
        kept, last = _their_hidden(self.theirs, tokens, mask)
        layers: list[LayerComparison] = []
        handles = [
            layer.register_forward_hook(_Watcher(int(number), kept, layers), prepend=True)
            for number, layer in self.ours.layers.items()
        ]
        hidden = final_hidden_of(self.ours, tokens)
        for handle in handles:
            handle.remove()
        logits = [
            compare_logits(prompt, hidden[row, :length], self.ours, head_logits(self.theirs, last[row, :length]))
            for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        ]
        return layers, logits

    def compare_generation(self, prompts: Sequence[Prompt]) -> GenerationComparison | None:
        """A few greedy tokens with both caches; None for a model of too few positions."""
        chosen = generation_prompts(prompts, self.ours.shape.max_position_embeddings, NEW_TOKENS)
        return compare_generation(self.theirs, self._decoding, chosen, NEW_TOKENS) if chosen else None

    def _decoding(self, rows: int, capacity: int) -> CachedDecoder:
        cached = CachedDecoder(self.ours, rows, capacity)
        stream_layers(cached.part, self.weights)
        return cached


def _their_hidden(theirs: Any, tokens: Tensor, mask: Tensor) -> tuple[_Hidden, Tensor]:
    """Hidden states of every layer, and those behind the last norm [batch, length, hidden]."""
    kept = _Hidden(mask)
    layers = decoder_layers(theirs)

    def before(_layer: nn.Module, args: Any, named: Any) -> None:
        kept.keep(args[0] if args else named["hidden_states"])

    def behind(_layer: nn.Module, _args: Any, output: Any) -> None:
        kept.keep(output if isinstance(output, Tensor) else output[0])
        give_back_freed()

    handles = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [layer.register_forward_hook(behind) for layer in layers]
    last = final_hidden(theirs, tokens, mask.long())
    for handle in handles:
        handle.remove()
    return kept, last


class _Watcher:
    """A hook of one of our layers: compares what it gave, and what it gives when it reads theirs."""

    def __init__(self, number: int, kept: _Hidden, found: list[LayerComparison]) -> None:
        self._number, self._kept, self._found = number, kept, found

    def __call__(self, layer: DecoderLayer, args: Any, output: Tensor) -> None:
        kept, number = self._kept, self._number
        x, *others = args
        if number == 0:
            self._compare("embedding", x, x, 0)
        own = type(layer).forward(layer, kept.padded(number), *others)
        self._compare(str(number), output, own, number + 1)

    def _compare(self, name: str, running: Tensor, own: Tensor, number: int) -> None:
        wanted, mask = self._kept.states[number], self._kept.mask
        difference, own_difference = (float((ours[mask] - wanted).abs().max()) for ours in (running, own))
        self._found.append(LayerComparison(name, difference, own_difference, float(wanted.abs().max())))
