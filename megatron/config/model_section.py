"""The [model] table: a decoder in Hugging Face's words."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron.config.errors import ConfigError
from megatron.config.rope_scaling import rope_scaling_of
from megatron.config.section import Section


class RopeScalingSection(Section):
    """Rotary frequencies stretched for longer contexts, in Hugging Face's words; rope_type = "default" for none."""

    rope_type: str = Field(description="linear, llama3 or yarn; default: none, where a preset has one")
    factor: float | None = Field(None, ge=1, description="how many times longer the context becomes")
    low_freq_factor: float | None = Field(None, gt=0, description="llama3")
    high_freq_factor: float | None = Field(None, gt=0, description="llama3")
    original_max_position_embeddings: int | None = Field(None, ge=1, description="llama3, yarn: length of pretraining")
    attention_factor: float | None = Field(None, gt=0, description="yarn; default 0.1 ln(factor) + 1")
    beta_fast: float | None = Field(None, gt=0, description="yarn; default 32")
    beta_slow: float | None = Field(None, gt=0, description="yarn; default 1")

    @model_validator(mode="after")
    def _check(self) -> RopeScalingSection:
        try:
            rope_scaling_of(self.model_dump(), "model.rope_scaling")
        except ConfigError as error:
            raise ValueError(str(error).removeprefix("model.rope_scaling: ")) from None
        return self


FamilyName = Literal[
    "llama", "mistral", "qwen2", "qwen3", "olmo2", "olmo3", "phi3", "gpt_neox", "gpt2", "gemma", "gemma2",
    "gemma3_text", "cohere",
]  # fmt: skip
"""The model_type of each family in hf/families/."""


class ModelSection(Section):
    """A decoder in Hugging Face's words. `preset` fills what is not said."""

    preset: str | None = Field(None, description="a name from megatron/config/presets.py")
    seq_length: int = Field(ge=1, description="input positions of a sample")
    vocab_size: int | None = Field(None, ge=1, description="taken from the tokenizer where absent")
    hidden_size: int | None = Field(None, ge=1)
    num_hidden_layers: int | None = Field(None, ge=1)
    num_attention_heads: int | None = Field(None, ge=1)
    num_key_value_heads: int | None = Field(None, ge=1, description="grouped-query attention; default: every head")
    head_dim: int | None = Field(None, ge=1, description="default: hidden_size / num_attention_heads")
    intermediate_size: int | None = Field(None, ge=1)
    hidden_act: Literal["silu", "gelu", "gelu_tanh"] | None = Field(None, description="silu and gated: SwiGLU")
    gated_mlp: bool | None = Field(None, description="gate and up projection; default true")
    norm: Literal["rmsnorm", "layernorm", "layernorm_no_bias"] | None = Field(
        None, description="layernorm_no_bias: LayerNorm with a weight alone (Cohere); default rmsnorm"
    )
    norm_eps: float | None = Field(None, gt=0)
    norm_place: Literal["before", "after", "both"] | None = Field(
        None, description="before attention and MLP (default), of what they give (OLMo 2), or both (Gemma)"
    )
    norm_unit_offset: bool | None = Field(None, description="RMSNorm multiplies by 1 + weight (Gemma)")
    attention_bias: bool | None = Field(None, description="biases on query, key, value and output projections")
    query_key_value_bias: bool | None = Field(None, description="biases on query, key and value alone (Qwen2)")
    qk_norm: Literal["none", "head", "width"] | None = Field(
        None, description="RMSNorm of queries and keys: over each head (Qwen3), or all heads at once (OLMo 2)"
    )
    mlp_bias: bool | None = None
    parallel_block: bool | None = Field(None, description="attention and MLP side by side, as GPT-NeoX")
    shared_norm: bool | None = Field(
        None, description="one norm before both of a parallel block (GPT-J, Cohere), instead of one before each"
    )
    position_embedding: Literal["rope", "learned"] | None = Field(
        None, description="learned: a vector for each position within a document, added to the token's (GPT-2)"
    )
    max_position_embeddings: int | None = Field(
        None, ge=1, description="learned: how many positions there are; default the longest sequence"
    )
    rope_theta: float | None = Field(None, gt=0)
    rope_scaling: RopeScalingSection | None = Field(None, description="default: none")
    partial_rotary_factor: float | None = Field(None, gt=0, le=1)
    sliding_window: int | None = Field(
        None, ge=0, description="so many positions, its own among them, does a layer's token see; default 0: all before"
    )
    sliding_pattern: int | None = Field(
        None,
        ge=0,
        description="every so-many-th layer sees all positions, without the window; default 0: none (Mistral)",
    )
    rope_local_theta: float | None = Field(
        None, ge=0, description="rope_theta of layers with the window, never scaled; default 0: as the others (Gemma 3)"
    )
    tie_word_embeddings: bool | None = None
    embedding_multiplier: float | None = Field(None, gt=0, description="of the embedding's vectors; default 1 (Gemma)")
    attention_multiplier: float | None = Field(
        None, ge=0, description="of attention scores; default 0: 1 / sqrt(head_dim)"
    )
    logit_multiplier: float | None = Field(
        None, gt=0, description="of the scores of words, before the softmax; default 1 (Cohere's logit_scale)"
    )
    initializer_range: float | None = Field(None, gt=0)
    hidden_dropout: float | None = Field(
        None, ge=0, lt=1, description="of the embedding and of what a layer adds to the residual stream; default 0"
    )
    document_mask: bool = Field(True, description="attention and positions never cross a document's end")
    family: FamilyName | None = Field(
        None, description="the model_type that an export is to have; default: the plainest that says the model"
    )
