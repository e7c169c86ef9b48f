"""A decoder language model by its shape: Llama's family and GPT-NeoX's, and what lies between.

Parameter names are global, the same in every layout: embedding.weight, layers.N.attention_norm.weight,
layers.N.attention.{query,key,value,output}.weight, layers.N.mlp_norm.weight, layers.N.mlp.{gate,up,down}.weight,
final_norm.weight, head.weight (absent where tied); the same with .bias where the shape has biases.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron.config.model_shape import ModelShape
from megatron.kernels.cross_entropy import CHUNK_ROWS, cross_entropy, linear_cross_entropy
from megatron.models.attention import Attention, AttentionBackend, AttentionPlan, plan_attention
from megatron.models.layers import Embedding, Linear, Norm
from megatron.models.mlp import MLP


class DecoderLayer(nn.Module):
    """Attention and MLP on the residual stream [batch, T, hidden], one after the other or side by side."""

    def __init__(self, shape: ModelShape, backend: AttentionBackend) -> None:
        super().__init__()
        self.attention_norm = Norm(shape)
        self.attention = Attention(shape, backend)
        self.mlp_norm = Norm(shape)
        self.mlp = MLP(shape)
        self.parallel = shape.parallel_block

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        attended = self.attention(self.attention_norm(x), plan)
        if self.parallel:
            return x + attended + self.mlp(self.mlp_norm(x))
        x = x + attended
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """The whole model. Parameters are unset until `initialise` or a state fills them."""

    def __init__(self, shape: ModelShape, backend: AttentionBackend = "blockwise") -> None:
        """backend: "blockwise" is the quick one on CPU, "sdpa" the definition and the one for GPUs."""
        super().__init__()
        self.shape, self.backend = shape, backend
        self.embedding = Embedding(shape)
        self.layers = nn.ModuleDict({str(n): DecoderLayer(shape, backend) for n in range(shape.num_hidden_layers)})
        self.final_norm = Norm(shape)
        tied = shape.tie_word_embeddings
        self.head = None if tied else Linear(shape.hidden_size, shape.padded_vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """The output projection [padded vocabulary, hidden]: the embedding itself where tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(self, tokens: Tensor, document_ids: Tensor) -> Tensor:
        """tokens int64 [batch, T], document_ids int [batch, T] -> hidden states after the last norm, [batch, T, h]."""
        x = self.embedding(tokens)
        plan = plan_attention(self.shape, document_ids, x.dtype, self.backend)
        for layer in self.layers.values():
            x = layer(x, plan)
        return self.final_norm(x)

    def logits(self, tokens: Tensor, document_ids: Tensor) -> Tensor:
        """Scores of the next token, [batch, T, vocab_size], in the weights' dtype; padding words are left out."""
        return self._scores(self(tokens, document_ids))

    def loss(self, tokens: Tensor, targets: Tensor, document_ids: Tensor) -> Tensor:
        """Loss of each position in nats, float32 [batch, T] (float64 for float64); 0 where the target is -100.

        Rows go through the head in chunks; differentiable by plain autograd, which then holds every chunk's logits.
        """
        hidden, flat = self(tokens, document_ids).flatten(0, 1), targets.reshape(-1)
        parts = [
            cross_entropy(self._scores(hidden[start : start + CHUNK_ROWS]), flat[start : start + CHUNK_ROWS])
            for start in range(0, flat.shape[0], CHUNK_ROWS)
        ]
        return torch.cat(parts).view(targets.shape)

    def training_loss(
        self, tokens: Tensor, targets: Tensor, document_ids: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """(scale x the sum of losses, to call backward on; each position's loss, detached, [batch, T]).

        scale: 1 / valid targets of the global batch. Never holds more than one chunk's logits.
        """
        hidden = self(tokens, document_ids).flatten(0, 1)
        total, losses = linear_cross_entropy(
            hidden, self.head_weight, targets.reshape(-1), self.shape.vocab_size, scale
        )
        return total, losses.view(targets.shape)

    def _scores(self, hidden: Tensor) -> Tensor:
        return (hidden @ self.head_weight.t())[..., : self.shape.vocab_size]
