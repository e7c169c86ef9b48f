"""A decoder's shape as Megatron-LM's args: the inverse of megatron_args, and what of a shape its models cannot say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron.config.model_shape import ModelShape
from megatron.foreign.megatron_names import Spelling

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Megatron-LM fixes of Llama 3's scaling."""


def refusals(shape: ModelShape, spelling: Spelling) -> Iterator[str]:
    """What Megatron-LM's models cannot say of a shape: field, value, and what they can."""
    legacy = spelling == "legacy"
    for name, only in (
        ("norm_place", "before"),
        ("parallel_block", False),
        ("shared_norm", False),
        ("embedding_multiplier", 1.0),
        ("attention_multiplier", 0.0),
        ("logit_multiplier", 1.0),
    ):
        if (value := getattr(shape, name)) != only:
            yield f"model.{name} = {value!r}: Megatron-LM can only say {only!r}"
    if shape.norm == "layernorm_no_bias":
        yield "model.norm = 'layernorm_no_bias': Megatron-LM can say 'rmsnorm', and 'layernorm' with biases"
    if shape.window_bites() or (shape.sliding_window and shape.rope_local_theta not in (0, shape.rope_theta)):
        yield (
            f"model.sliding_window = {shape.sliding_window}, below {shape.max_position_embeddings} positions or with a "
            "rotary base of its own: windows are not written in Megatron-LM's files"
        )
    if shape.attention_bias != shape.mlp_bias:
        yield (
            f"model.attention_bias = {shape.attention_bias} and model.mlp_bias = {shape.mlp_bias}: Megatron-LM has one "
            "flag for both (--disable-bias-linear)"
        )
    if shape.qk_norm != "none" and (legacy or shape.qk_norm != "head" or shape.norm != "rmsnorm"):
        yield f"model.qk_norm = {shape.qk_norm!r}: Megatron-LM can say it over each head, in RMSNorm models of mcore"
    if shape.gated_mlp != (shape.hidden_act == "silu"):
        yield (
            f"model.hidden_act = {shape.hidden_act!r} with gated_mlp = {shape.gated_mlp}: Megatron-LM can say "
            "gated silu (--swiglu) and plain gelu"
        )
    if shape.hidden_act == "gelu_tanh" and not shape.mlp_bias and not legacy:
        yield "model.hidden_act = 'gelu_tanh' without biases: mcore computes it only where it fuses it with a bias"
    if legacy and shape.position_embedding == "rope" and shape.rope_theta != 10000:
        yield f"model.rope_theta = {shape.rope_theta:g}: legacy models turn by 10000 whatever args say: use mcore"
    scaling = shape.rope_scaling
    if scaling is None:
        return
    factor = scaling.factor
    if scaling.rope_type == "linear" and factor == int(factor):
        return
    if scaling.rope_type == "llama3" and not legacy and all(getattr(scaling, k) == v for k, v in _LLAMA3.items()):
        return
    yield (
        f"model.rope_scaling = {scaling.to_json()}: Megatron-LM can say linear with a whole factor and, in "
        f"mcore, llama3 with {', '.join(f'{key} = {value:g}' for key, value in _LLAMA3.items())}"
    )


def args_for(shape: ModelShape, spelling: Spelling, tensor: int, pipeline: int, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments that Megatron-LM takes from a checkpoint (--use-checkpoint-args), those that it compares, and those
    that its converter reads. dtype: of the weights."""
    return {
        **_model(shape),
        **_positions(shape),
        **_activation(shape, spelling),
        "attention_dropout": 0.0,
        "hidden_dropout": shape.hidden_dropout,
        "init_method_std": shape.initializer_range,
        "apply_query_key_layer_scaling": False,
        "num_experts": None,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "virtual_pipeline_model_parallel_size": None,
        "num_layers_per_virtual_pipeline_stage": None,
        "expert_model_parallel_size": 1,
        "sequence_parallel": False,
        "use_legacy_models": spelling == "legacy",
        "transformer_impl": "transformer_engine" if spelling == "mcore" else "local",
        "ckpt_format": "torch",
        "tokenizer_type": None,
        "tokenizer_model": None,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }


def _model(shape: ModelShape) -> dict[str, Any]:
    grouped = shape.num_key_value_heads != shape.num_attention_heads
    return {
        "num_layers": shape.num_hidden_layers,
        "encoder_num_layers": shape.num_hidden_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.intermediate_size,
        "num_attention_heads": shape.num_attention_heads,
        "kv_channels": shape.head_dim,
        "group_query_attention": grouped,
        "num_query_groups": shape.num_key_value_heads if grouped else 1,
        "normalization": "RMSNorm" if shape.norm == "rmsnorm" else "LayerNorm",
        "norm_epsilon": shape.norm_eps,
        "apply_layernorm_1p": shape.norm_unit_offset,
        "add_bias_linear": shape.mlp_bias,
        "add_qkv_bias": shape.query_key_value_bias,
        "qk_layernorm": shape.qk_norm == "head",
        "untie_embeddings_and_output_weights": not shape.tie_word_embeddings,
    }


def _positions(shape: ModelShape) -> dict[str, Any]:
    learned, scaling = shape.position_embedding == "learned", shape.rope_scaling
    linear = scaling if scaling and scaling.rope_type == "linear" else None
    llama3 = scaling if scaling and scaling.rope_type == "llama3" else None
    return {
        "seq_length": shape.max_position_embeddings,
        "max_position_embeddings": shape.max_position_embeddings,
        "position_embedding_type": "learned_absolute" if learned else "rope",
        "add_position_embedding": True,
        "use_rotary_position_embeddings": not learned,
        "rotary_base": int(shape.rope_theta) if shape.rope_theta == int(shape.rope_theta) else shape.rope_theta,
        "rotary_percent": shape.partial_rotary_factor,
        "rotary_interleaved": False,
        "rotary_seq_len_interpolation_factor": int(linear.factor) if linear else None,
        "use_rope_scaling": llama3 is not None,
        "rope_scaling_factor": llama3.factor if llama3 else 8.0,
    }


def _activation(shape: ModelShape, spelling: Spelling) -> dict[str, Any]:
    by_tanh = shape.hidden_act == "gelu_tanh"
    return {
        "swiglu": shape.gated_mlp,
        "squared_relu": False,
        "openai_gelu": by_tanh and spelling == "legacy",
        "onnx_safe": None,
        "bias_gelu_fusion": by_tanh and shape.mlp_bias,
    }


def flags_for(shape: ModelShape, spelling: Spelling, divisible_by: int) -> list[str]:
    """Options that Megatron-LM needs beside --use-checkpoint-args, which does not take them from a checkpoint."""
    flags = [f"--make-vocab-size-divisible-by {divisible_by}"]
    flags += [f"--norm-epsilon {shape.norm_eps:g}"] if shape.norm_eps != 1e-5 else []
    flags += ["--use-legacy-models"] if spelling == "legacy" else []
    flags += ["--transformer-impl local"] if spelling != "mcore" else []
    flags += ["--qk-layernorm"] if shape.qk_norm == "head" else []
    if not shape.gated_mlp:
        said = _activation(shape, spelling)
        flags += ["--openai-gelu"] if said["openai_gelu"] else []
        flags += ["--no-bias-gelu-fusion"] if shape.mlp_bias and not said["bias_gelu_fusion"] else []
    said = _positions(shape)
    if said["use_rope_scaling"]:
        flags.append(f"--use-rope-scaling --rope-scaling-factor {said['rope_scaling_factor']:g}")
    if said["rotary_seq_len_interpolation_factor"]:
        flags.append(f"--rotary-seq-len-interpolation-factor {said['rotary_seq_len_interpolation_factor']}")
    return flags
