"""A decoder language model by its shape: the families of Llama, Qwen, OLMo 2, GPT-2, GPT-NeoX and Cohere, and what
lies between; or a rank's part of it.

Parameter names are global, the same in every layout: embedding.weight, positions.weight (learned), for each layer N
layers.N.attention_norm.weight, layers.N.attention.{query,key,value,output}.weight, layers.N.attention.{query,key}_norm
.weight, layers.N.attention_after_norm.weight, the same of mlp with layers.N.mlp.{gate,up,down}.weight, then
final_norm.weight and head.weight (absent where tied); .bias beside .weight, and which norms there are, as the shape
says. A tied head on another rank than the embedding is a second embedding.weight. Parameters have their local sizes
(`parameter_cuts`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron.config.layout_sizes import tensor_refusals
from megatron.config.model_shape import ModelShape
from megatron.kernels.choice import Kernels
from megatron.kernels.cross_entropy import cross_entropy_in_place, linear_cross_entropy, linear_losses
from megatron.kernels.document_lengths import DocumentBounds
from megatron.kernels.dropout import ATTENTION, EMBEDDING
from megatron.kernels.dropout import MLP as MLP_OUTPUT
from megatron.models.attention import Attention, AttentionPlan, context_method, document_places, plan_attention
from megatron.models.layers import Embedding, Linear, Norm, column_linear
from megatron.models.mlp import MLP
from megatron.models.positions import Positions, check_length
from megatron.models.residual_dropout import ResidualDropout
from megatron.parallel.context_attention import local_positions
from megatron.parallel.model_place import ONE_PROCESS, ModelPlace
from megatron.parallel.tensor_mappings import enter, gather_from_sequence

EAGER = Kernels()
"""The definitions, and the quick attention for CPUs."""


class DecoderLayer(nn.Module):
    """Attention and MLP on the residual stream [batch, T_local, hidden], one after the other or side by side."""

    def __init__(self, shape: ModelShape, kernels: Kernels, place: ModelPlace, number: int) -> None:
        """number: the layer's, of the whole model."""
        super().__init__()
        before, after = shape.norms_before, shape.norms_after
        self.attention_norm = Norm(shape, kernels, place) if before else None
        self.attention = Attention(shape, kernels, place)
        self.attention_after_norm = Norm(shape, kernels, place) if after else None
        self.mlp_norm = Norm(shape, kernels, place) if before and not shape.shared_norm else None
        self.mlp = MLP(shape, kernels, place)
        self.mlp_after_norm = Norm(shape, kernels, place) if after else None
        self.parallel, self.number, self.slides = shape.parallel_block, number, shape.slides(number)

    def forward(self, x: Tensor, plan: AttentionPlan, dropout: ResidualDropout | None = None) -> Tensor:
        normed = x if self.attention_norm is None else self.attention_norm(x)
        attended = self.attention(normed, plan.of(self.slides))
        if self.attention_after_norm is not None:
            attended = self.attention_after_norm(attended)
        if dropout is not None:
            attended = dropout.drop(attended, self.number, ATTENTION)
        if self.parallel:
            if self.mlp_norm is not None:
                normed = self.mlp_norm(x)
            return x + attended + self._mlp(normed, dropout)
        if self.mlp_norm is None:
            normed = x = x + attended
        else:
            normed, x = self.mlp_norm.after_adding(x, attended)
        return x + self._mlp(normed, dropout)

    def _mlp(self, normed: Tensor, dropout: ResidualDropout | None) -> Tensor:
        y = self.mlp(normed)
        if self.mlp_after_norm is not None:
            y = self.mlp_after_norm(y)
        return y if dropout is None else dropout.drop(y, self.number, MLP_OUTPUT)


class Decoder(nn.Module):
    """The model, or the part of it that a place says. Parameters are unset until `initialise` or a state fills them."""

    def __init__(
        self,
        shape: ModelShape,
        kernels: Kernels = EAGER,
        place: ModelPlace = ONE_PROCESS,
        seed: int = 0,
    ) -> None:
        """kernels: what its operations run on. seed: of dropout.

        Raises ConfigError where the shape does not divide over the tensor or context ranks.
        """
        super().__init__()
        # A pipeline hands on tensors only, so that whoever runs the model sets these before.
        self.scale = 1.0  # where forward is not told
        self.bounds: DocumentBounds | None = None  # of the microbatches to come, counted on the host
        for refusal in tensor_refusals(place.tensor.size, shape):
            raise refusal
        self.shape, self.kernels, self.place, self.seed = shape, kernels, place, seed
        self.objective: dict[str, float] = {}  # what is minimised beside cross-entropy: z_loss, label_smoothing
        self.context_method, self.context_words = context_method(shape, place)
        numbers = range(shape.num_hidden_layers) if place.layers is None else place.layers
        tied = shape.tie_word_embeddings
        self.embedding = Embedding(shape, place) if place.first or (place.last and tied) else None
        learned = shape.position_embedding == "learned"
        self.positions = Positions(shape, place) if place.first and learned else None
        self.layers = nn.ModuleDict({str(n): DecoderLayer(shape, kernels, place, n) for n in numbers})
        # The head is linear: what scores are multiplied by, the last norm multiplies by.
        self.final_norm = Norm(shape, kernels, place, shape.logit_multiplier) if place.last else None
        self.head: Linear | None = None
        if place.last and not tied:
            self.head = column_linear(
                shape.hidden_size, shape.padded_vocab_size, False, replace(kernels, fp8=False), place
            )

    @property
    def head_weight(self) -> Tensor:
        """The output projection [padded vocabulary, hidden], cut by words: the embedding's where tied."""
        holder = self.embedding if self.head is None else self.head
        assert holder is not None, "the head is on another pipeline rank"
        return holder.weight

    def forward(
        self,
        x: Tensor,
        document_ids: Tensor,
        targets: Tensor | None = None,
        scale: float | None = None,
        sample_numbers: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """This rank's part of the model on its part of the sequence.

        x: tokens int64 [batch, T] where the embedding is here, else hidden states [batch, T_local, hidden], where
        T_local is T / context / (tensor under sequence). document_ids int [batch, T], targets int64 [batch, T] (-100:
        none): whole, the model takes its positions. sample_numbers int64 [batch]: key dropout. scale: 1 / valid
        targets of the global batch.

        Returns hidden states [batch, T_local, hidden] where the head is elsewhere; with targets (scale x the sum of
        losses over this rank's positions, [1], differentiable; each row's sum of losses, float64 [batch], detached),
        the same on all tensor ranks; without them hidden states after the last norm, of all tensor ranks' positions.
        """
        positions = self._positions(document_ids)
        hidden = self._hidden(x, document_ids, positions, self._dropout(document_ids, positions, sample_numbers))
        if not self.place.last:
            return hidden
        if targets is None:
            return gather_from_sequence(hidden, self.place.tensor) if self.place.sequence else hidden
        own = targets if positions is None else targets[:, positions]
        return self._total_and_rows(hidden, own, self.scale if scale is None else scale)

    def _hidden(
        self, x: Tensor, document_ids: Tensor, positions: Tensor | None, dropout: ResidualDropout | None
    ) -> Tensor:
        check_length(self.shape, document_ids.shape[1])
        if self.place.first:
            places = None if self.positions is None else document_places(self.shape, document_ids, positions)
            x = self.embedded(x if positions is None else x[:, positions], places)
            x = x if dropout is None else dropout.drop(x, 0, EMBEDDING)
        plan = plan_attention(
            self.shape, document_ids, x.dtype, self.kernels.attention, self.place, positions, self.bounds
        )
        for layer in self.layers.values():
            x = layer(x, plan, dropout)
        return x if self.final_norm is None else self.final_norm(x)

    def embedded(self, tokens: Tensor, places: Tensor | None) -> Tensor:
        """What enters the first layer, [batch, T_local, hidden], of tokens int64 [batch, T]. places: each token's
        number within its document, int64 [batch or 1, T]; needed where positions are learned."""
        assert self.embedding is not None, "the embedding is on another pipeline rank"
        x = self.embedding(tokens)
        if self.shape.embedding_multiplier != 1:
            x = x * self.shape.embedding_multiplier
        if self.positions is None:
            return x
        assert places is not None, "learned positions are looked up by place"
        return self.positions(x, places)

    def _dropout(
        self, document_ids: Tensor, positions: Tensor | None, sample_numbers: Tensor | None
    ) -> ResidualDropout | None:
        if not self.training or self.shape.hidden_dropout == 0:
            return None
        if sample_numbers is None:
            raise ValueError("a model with dropout in training is told its sample_numbers, or put into eval()")
        if positions is None:
            positions = torch.arange(document_ids.shape[1], device=document_ids.device)
        if self.place.sequence:
            positions = positions.chunk(self.place.tensor.size)[self.place.tensor.rank]
        return ResidualDropout(self.shape.hidden_dropout, self.seed, sample_numbers, positions)

    def _positions(self, document_ids: Tensor) -> Tensor | None:
        """Positions that this context rank holds; None for all."""
        if self.place.context.alone:
            return None
        return local_positions(document_ids.shape[1], self.place.context, self.context_method).to(document_ids.device)

    def _total_and_rows(self, hidden: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        axis, words = self.place.tensor, self.shape.vocab_size
        hidden, flat = enter(hidden, axis, self.place.sequence).flatten(0, 1), targets.reshape(-1)
        ranks, library = (axis.rank, axis.size, axis.group), self.kernels.product
        kernels = self.kernels.cross_entropy
        if not torch.is_grad_enabled():
            losses = linear_losses(hidden, self.head_weight, flat, words, *ranks, kernels=kernels, library=library)
            total = losses.sum() * scale
        elif self.place.split_backward:
            logits = functional.linear(hidden, self.head_weight)
            total, losses = cross_entropy_in_place(
                logits, flat, words, scale, *ranks, kernels=kernels, **self.objective
            )
        else:
            head = (hidden, self.head_weight, flat, words, scale, *ranks)
            total, losses = linear_cross_entropy(*head, kernels=kernels, library=library, **self.objective)
        # Not a view: a schedule that runs input gradients first detaches what a stage returns in place.
        return torch.stack((total,)), losses.view(targets.shape).sum(1, dtype=torch.float64)

    def logits(self, tokens: Tensor, document_ids: Tensor) -> Tensor:
        """Scores of the next token, [batch, T, vocab_size], in the weights' dtype; padding words are left out.

        For a whole model in one process; without dropout.
        """
        return (self._hidden(tokens, document_ids, None, None) @ self.head_weight.t())[..., : self.shape.vocab_size]

    def loss(self, tokens: Tensor, targets: Tensor, document_ids: Tensor) -> Tensor:
        """Loss of each position in nats, float32 [batch, T] (float64 for float64); 0 where the target is -100.

        For a whole model in one process; without dropout. Differentiable by plain autograd, which holds all logits.
        """
        hidden = self._hidden(tokens, document_ids, None, None).flatten(0, 1)
        losses = linear_losses(hidden, self.head_weight, targets.reshape(-1), self.shape.vocab_size)
        return losses.view(targets.shape)
