"""Random models of `transformers` with a Decoder's weights, to compare with in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatron.config.model_shape import ModelShape
from megatron.models.decoder import Decoder

Model = nn.Module
WORDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
WORDS += ("num_key_value_heads", "head_dim", "tie_word_embeddings", "max_position_embeddings")


@contextmanager
def all_in_float64() -> Iterator[None]:
    """While it lasts, what `transformers` casts to float32 (norms, angles, softmax) is float64."""
    wide = {"float32": torch.float64, "float": torch.float64}
    with mock.patch.multiple(torch, **wide), mock.patch.object(Tensor, "float", Tensor.double):
        yield


def _words(shape: ModelShape) -> dict[str, Any]:
    scaling = {} if shape.rope_scaling is None else shape.rope_scaling.to_json()
    rope = {"rope_type": "default", "rope_theta": shape.rope_theta, **scaling}
    if shape.partial_rotary_factor != 1:
        rope["partial_rotary_factor"] = shape.partial_rotary_factor
    common = {name: getattr(shape, name) for name in WORDS}
    ends = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}
    return common | ends | {"rms_norm_eps": shape.norm_eps, "rope_parameters": rope, "attn_implementation": "eager"}


_LLAMA_LAYER = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_OLMO2_LAYER = _LLAMA_LAYER | {
    "attention_after_norm": "post_attention_layernorm",
    "mlp_after_norm": "post_feedforward_layernorm",
}
_GEMMA3_LAYER = _LLAMA_LAYER | {
    "attention_after_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_after_norm": "post_feedforward_layernorm",
}
_LLAMA_ENDS = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
_GPT2_LAYER = {
    "attention_norm": "ln_1",
    "mlp_norm": "ln_2",
    "attention.output": "attn.c_proj",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
_GPT2_ENDS = {"embedding": "transformer.wte", "positions": "transformer.wpe", "final_norm": "transformer.ln_f"}


class Twin:
    """A model of `transformers` and, for each of our tensors, where it lies in theirs: a parameter's name, whether it
    is transposed there, and its rows (None: all, but for padding of the vocabulary)."""

    def __init__(self, model: Model, shape: ModelShape, ours: Decoder, place: Callable[[str], Any]) -> None:
        self.model, self.shape, self.place = model.double().eval(), shape, place
        theirs = dict(self.model.named_parameters())
        written = set()
        with torch.no_grad():
            for name, value in ours.named_parameters():
                target, part = self._part(theirs, name)
                part.copy_(self._without_padding(name, value))
                written.add(target)
        assert written == set(theirs), f"not written: {sorted(set(theirs) - written)}"

    def _part(self, theirs: dict[str, Tensor], name: str) -> tuple[str, Tensor]:
        target, transposed, rows = self.place(name)
        whole = theirs[target].t() if transposed else theirs[target]
        return target, whole if rows is None else whole[rows]

    def _without_padding(self, name: str, value: Tensor) -> Tensor:
        return value[: self.shape.vocab_size] if name in ("embedding.weight", "head.weight") else value

    def gradients(self, ours: Decoder) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, our gradient, theirs) of every parameter."""
        theirs = {name: p.grad for name, p in self.model.named_parameters()}
        for name, parameter in ours.named_parameters():
            assert parameter.grad is not None
            yield name, self._without_padding(name, parameter.grad), self._part(theirs, name)[1]


def _llama_like(layer: dict[str, str]) -> Callable[[str], Any]:
    def place(name: str) -> Any:
        module, kind = name.rsplit(".", 1)
        if not module.startswith("layers."):
            return f"{_LLAMA_ENDS[module]}.{kind}", False, None
        _, number, rest = module.split(".", 2)
        return f"model.layers.{number}.{layer[rest]}.{kind}", False, None

    return place


def _parts(sizes: dict[str, int]) -> dict[str, slice]:
    ends = [sum(list(sizes.values())[: number + 1]) for number in range(len(sizes))]
    return {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}


def _query_key_value(shape: ModelShape) -> dict[str, slice]:
    query, key = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    return _parts({"attention.query": query, "attention.key": key, "attention.value": key})


def _phi3_place(shape: ModelShape) -> Callable[[str], Any]:
    joined = {name: ("self_attn.qkv_proj", rows) for name, rows in _query_key_value(shape).items()}
    halves = _parts({"mlp.gate": shape.intermediate_size, "mlp.up": shape.intermediate_size})
    joined |= {name: ("mlp.gate_up_proj", rows) for name, rows in halves.items()}
    plain = _llama_like(_LLAMA_LAYER)

    def place(name: str) -> Any:
        for part, (target, rows) in joined.items():
            if f".{part}." in name:
                return f"model.layers.{name.split('.')[1]}.{target}.weight", False, rows
        return plain(name)

    return place


def _gpt2_place(shape: ModelShape) -> Callable[[str], Any]:
    joined = _query_key_value(shape)

    def place(name: str) -> Any:
        module, kind = name.rsplit(".", 1)
        if not module.startswith("layers."):
            return f"{_GPT2_ENDS[module]}.{kind}", False, None
        _, number, rest = module.split(".", 2)
        there = f"transformer.h.{number}."
        if rest in joined:
            return f"{there}attn.c_attn.{kind}", kind == "weight", joined[rest]
        return f"{there}{_GPT2_LAYER[rest]}.{kind}", kind == "weight" and "norm" not in rest, None

    return place


def llama(shape: ModelShape, ours: Decoder) -> Twin:
    model = LlamaForCausalLM(LlamaConfig(**_words(shape), attention_bias=shape.attention_bias, mlp_bias=shape.mlp_bias))
    return Twin(model, shape, ours, _llama_like(_LLAMA_LAYER))


def mistral(shape: ModelShape, ours: Decoder) -> Twin:
    model = MistralForCausalLM(MistralConfig(**_words(shape), sliding_window=shape.sliding_window or None))
    return Twin(model, shape, ours, _llama_like(_LLAMA_LAYER))


def qwen2(shape: ModelShape, ours: Decoder) -> Twin:
    return Twin(Qwen2ForCausalLM(Qwen2Config(**_words(shape))), shape, ours, _llama_like(_LLAMA_LAYER))


def qwen3(shape: ModelShape, ours: Decoder) -> Twin:
    return Twin(Qwen3ForCausalLM(Qwen3Config(**_words(shape))), shape, ours, _llama_like(_LLAMA_LAYER))


def olmo2(shape: ModelShape, ours: Decoder) -> Twin:
    return Twin(Olmo2ForCausalLM(Olmo2Config(**_words(shape))), shape, ours, _llama_like(_OLMO2_LAYER))


def phi3(shape: ModelShape, ours: Decoder) -> Twin:
    words = _words(shape) | {"partial_rotary_factor": shape.partial_rotary_factor}
    words["sliding_window"] = shape.sliding_window or None
    return Twin(Phi3ForCausalLM(Phi3Config(**words)), shape, ours, _phi3_place(shape))


def gemma3(shape: ModelShape, ours: Decoder) -> Twin:
    rope = _words(shape)["rope_parameters"]
    local = {"rope_type": "default", "rope_theta": shape.rope_local_theta or shape.rope_theta}
    kinds = ["sliding" if shape.slides(number) else "full" for number in range(shape.num_hidden_layers)]
    config = Gemma3TextConfig(
        **_words(shape)
        | {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": round(shape.attention_scale**-2),
            "layer_types": [f"{kind}_attention" for kind in kinds],
            "sliding_window": shape.sliding_window,
            "rope_parameters": {"full_attention": rope, "sliding_attention": local},
        }
    )
    return Twin(Gemma3ForCausalLM(config), shape, ours, _llama_like(_GEMMA3_LAYER))


class _CohereTwin(Twin):
    """Rows of queries and keys lie as neighbours there: dimension i of a head's first half, then of its second."""

    def _without_padding(self, name: str, value: Tensor) -> Tensor:
        if ".query." not in name and ".key." not in name:
            return super()._without_padding(name, value)
        first, second = value.unflatten(0, (-1, 2, self.shape.head_dim // 2)).unbind(1)
        return torch.stack([first, second], 2).flatten(0, 2)


def cohere(shape: ModelShape, ours: Decoder) -> Twin:
    words = _words(shape) | {"layer_norm_eps": shape.norm_eps, "attention_bias": shape.attention_bias}
    model = CohereForCausalLM(CohereConfig(**words, logit_scale=shape.logit_multiplier))
    return _CohereTwin(model, shape, ours, _llama_like(_LLAMA_LAYER))


def gpt2(shape: ModelShape, ours: Decoder) -> Twin:
    config = GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.max_position_embeddings,
        n_embd=shape.hidden_size,
        n_layer=shape.num_hidden_layers,
        n_head=shape.num_attention_heads,
        n_inner=shape.intermediate_size,
        layer_norm_epsilon=shape.norm_eps,
        attn_implementation="eager",
    )
    return Twin(GPT2LMHeadModel(config), shape, ours, _gpt2_place(shape))
