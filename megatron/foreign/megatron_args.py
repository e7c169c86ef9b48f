"""What Megatron-LM's args say of a GPT, as keys of our [model] table; what the decoder cannot express is refused.

The args are those of megatron/training/arguments.py there, as they stand after its checks. An argument that an older
version did not have stands for that version's only behaviour, which is the default that it has been given since.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron.config.errors import CheckpointError, ConfigError
from megatron.foreign.inert_pickle import Stub
from megatron.foreign.megatron_names import Era
from megatron.foreign.megatron_weights import Habits
from megatron.foreign.padding import DIVISIBLE_BY

_NEEDED = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
_DEFAULTS: dict[str, Any] = {
    "seq_length": None,
    "ffn_hidden_size": None,
    "kv_channels": None,
    "group_query_attention": False,
    "num_query_groups": None,
    "normalization": "LayerNorm",
    "norm_epsilon": 1e-5,
    "apply_layernorm_1p": False,
    "add_bias_linear": True,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "swiglu": False,
    "openai_gelu": False,
    "onnx_safe": None,
    "bias_gelu_fusion": True,
    "position_embedding_type": "learned_absolute",
    "use_rotary_position_embeddings": False,
    "add_position_embedding": True,
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "use_rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "softmax_scale": None,
    "untie_embeddings_and_output_weights": False,
    "init_method_std": 0.02,
    "padded_vocab_size": None,
}
_OLDER_NAMES = {"norm_epsilon": "layernorm_epsilon", "apply_layernorm_1p": "layernorm_zero_centered_gamma"}

_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_experts": ((None, 0, 1), "a mixture of experts"),
    "multi_latent_attention": ((False,), "latent attention"),
    "mtp_num_layers": ((None, 0), "prediction of several tokens"),
    "hybrid_layer_pattern": ((None, ""), "a hybrid of Mamba and attention"),
    "hybrid_override_pattern": ((None, ""), "a hybrid of Mamba and attention"),
    "hybrid_attention_ratio": ((0, None), "a hybrid of Mamba and attention"),
    "spec": ((None, [], ["local"], "local"), "layers of another kind"),
    "experimental_attention_variant": ((None,), "another kind of attention"),
    "heterogeneous_layers_config_path": ((None,), "layers that differ from each other"),
    "heterogeneous_layers_config_encoded_json": ((None, ""), "layers that differ from each other"),
    "squared_relu": ((False,), "the activation relu(x)^2"),
    "quick_geglu": ((False,), "the activation x sigmoid(1.702 x)"),
    "activation_func_clamp_value": ((None,), "clamped activations"),
    "glu_linear_offset": ((0, None), "an offset within the gated MLP"),
    "apply_residual_connection_post_layernorm": ((False,), "residuals taken behind the norm"),
    "window_size": ((None,), "attention in a sliding window"),
    "no_rope_freq": ((None,), "layers without positions"),
    "softmax_type": (("vanilla",), "another softmax"),
    "attention_output_gate": ((False,), "gated attention"),
    "qk_l2_norm": ((False,), "norms of queries and keys without weights"),
    "use_mup": ((False,), "multipliers of muP"),
    "retro_add_retriever": ((False,), "retrieval"),
    "use_alibi_position_embeddings": ((False,), "ALiBi positions"),
    "embed_layernorm": ((False,), "a norm behind the embedding"),
    "parallel_attn": ((False,), "parallel blocks of a fork, with one norm for both"),
    "glu_activation": ((None, "swiglu"), "an activation of a fork"),
}
"""Arguments that change what is computed, the values that the decoder can express, and what the others ask for."""

COMPARED = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    *_NEEDED,
    *_DEFAULTS,
)
"""Arguments that all ranks' files must have alike."""

READ = frozenset(
    (*_NEEDED, *_DEFAULTS, *_OLDER_NAMES.values(), *_ONLY, DIVISIBLE_BY),
)
"""Every argument that has a meaning here, under either of its names."""

_TRAINING = (
    "hidden_dropout",
    "attention_dropout",
    "weight_decay",
    "lr",
    "global_batch_size",
    "train_iters",
    "bf16",
    "fp16",
)


@dataclass(frozen=True)
class ForeignModel:
    """A model of another trainer in our words.

    fields: keys of the [model] table. said: lines for the user: what was read and what it became. ignored: what of the
    training was left behind. max_position_embeddings: positions that it was made for.
    """

    fields: Mapping[str, Any]
    habits: Habits
    max_position_embeddings: int
    said: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


@dataclass
class _Args:
    """Reads arguments and keeps what was not said."""

    values: Mapping[str, Any]
    where: str
    missing: list[str] = field(default_factory=list)

    def get(self, name: str) -> Any:
        for key in (name, _OLDER_NAMES.get(name, name)):
            if key in self.values and (value := self.values[key]) is not None:
                return _plain(value, key, self.where)
        if name not in self.values and _DEFAULTS[name] is not None:
            self.missing.append(f"{name} ({_DEFAULTS[name]})")
        return _DEFAULTS[name]

    def count(self, name: str, otherwise: int | None = None) -> int:
        value = self.values.get(name)
        if value is None and otherwise is not None:
            return otherwise
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(
                f"{self.where}: args.{name} is {_shown(value)}, which is no count: --set {name}=NUMBER"
            )
        return value


def _plain(value: Any, key: str, where: str) -> Any:
    """A value that is used; an enumeration of theirs gives its last argument or name. Raises CheckpointError."""
    if isinstance(value, int | float | str | list | tuple):
        return value
    raise CheckpointError(f"{where}: args.{key} is {_shown(value)}, which has no meaning here: --set {key}=VALUE")


def _shown(value: Any) -> str:
    """A value from a file for an error; short whatever it is."""
    return repr(value)[:60] if isinstance(value, int | float | str | bool | None | Stub) else type(value).__name__


def model_of_args(
    args: Mapping[str, Any], where: str, version: float, era: Era, overridden: Collection[str] = ()
) -> ForeignModel:
    """The model that args describe. overridden: those that the user has said anew.

    Raises ConfigError naming every argument that the decoder cannot express, CheckpointError for one that is missing
    or has no meaning.
    """
    _refuse(args, where)
    if era == "legacy":
        _refuse_without_effect(args, where, overridden)
    said = _Args(args, where)
    fields: dict[str, Any] = {
        "hidden_size": said.count("hidden_size"),
        "num_hidden_layers": said.count("num_layers"),
        "num_attention_heads": said.count("num_attention_heads"),
        "initializer_range": float(said.get("init_method_std")),
        "tie_word_embeddings": not said.get("untie_embeddings_and_output_weights"),
    }
    longest = said.count("max_position_embeddings")
    fields["seq_length"] = min(said.count("seq_length", longest), longest)
    fields |= _attention(said, fields, version) | _mlp(said, fields, era) | _norms(said) | _positions(said, longest)
    plus = 1.0 if said.get("apply_layernorm_1p") else 0.0
    habits = Habits(version, bool(said.get("rotary_interleaved")) and "rope_theta" in fields, plus)
    lines = [_line(fields, habits)]
    if said.missing:
        lines.append(f"not in args, so Megatron-LM's default: {', '.join(said.missing)}")
    ignored = tuple(f"{name} = {_shown(args[name])}" for name in _TRAINING if args.get(name) is not None)
    return ForeignModel(fields, habits, longest, tuple(lines), ignored)


def _refuse(args: Mapping[str, Any], where: str) -> None:
    faults = []
    for name, (values, why) in _ONLY.items():
        value = args.get(name, values[0])
        if not any(type(value) in (type(only), int, float) and value == only for only in values):
            faults.append(f"args.{name} = {_shown(value)}: {why}")
    if args.get("normalization", "LayerNorm") not in ("LayerNorm", "RMSNorm"):
        faults.append(f"args.normalization = {_shown(args['normalization'])}: there are LayerNorm and RMSNorm")
    if args.get("qk_layernorm") and args.get("normalization") != "RMSNorm":
        faults.append("args.qk_layernorm = True with LayerNorm: norms of queries and keys are RMSNorms")
    if faults:
        raise ConfigError("\n  ".join([f"{where}: a model that the decoder cannot express:", *faults]))


def _refuse_without_effect(args: Mapping[str, Any], where: str, overridden: Collection[str]) -> None:
    """Arguments that Megatron-LM's legacy models do not look at: what they say is not what the model was run with."""
    if not args.get("use_rotary_position_embeddings") and args.get("position_embedding_type") != "rope":
        return
    for name, plain, does in (("rotary_base", 10000, "turn by base 10000"), ("use_rope_scaling", False, "never scale")):
        value = args.get(name)
        if value not in (None, plain) and name not in overridden:
            raise ConfigError(
                f"{where}: args.{name} = {_shown(value)}, and Megatron-LM's legacy models {does} whatever it says: say "
                f"what the weights were made for with --set {name}={plain}, or --set {name}={_shown(value)}"
            )


def _attention(said: _Args, fields: Mapping[str, Any], version: float) -> dict[str, Any]:
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    groups = said.count("num_query_groups", heads) if said.get("group_query_attention") else heads
    if version < 2 and groups != heads:
        raise CheckpointError(
            f"{said.where}: checkpoint_version {version:g} has no query groups, and args have {groups}"
        )
    biases = bool(said.get("add_bias_linear"))
    found: dict[str, Any] = {
        "num_key_value_heads": groups,
        "head_dim": said.count("kv_channels", hidden // heads),
        "attention_bias": biases,
        "mlp_bias": biases,
    }
    if said.get("add_qkv_bias") and not biases:
        found["query_key_value_bias"] = True
    if said.get("qk_layernorm"):
        found["qk_norm"] = "head"
    if (scale := said.get("softmax_scale")) is not None:
        found["attention_multiplier"] = float(scale)
    return found


def _mlp(said: _Args, fields: Mapping[str, Any], era: Era) -> dict[str, Any]:
    """SwiGLU, or GELU: by its error function, or by tanh where Megatron-LM fuses it with the bias. Legacy models had
    two more ways to say which."""
    gated = bool(said.get("swiglu"))
    legacy = era == "legacy"
    if gated:
        act = "silu"
    elif legacy and (said.get("openai_gelu") or said.get("onnx_safe")):
        act = "gelu_tanh" if said.get("openai_gelu") else "gelu"
    else:
        act = "gelu_tanh" if said.get("bias_gelu_fusion") and said.get("add_bias_linear") else "gelu"
    inner = said.count("ffn_hidden_size", 4 * fields["hidden_size"])
    return {"gated_mlp": gated, "hidden_act": act, "intermediate_size": inner}


def _norms(said: _Args) -> dict[str, Any]:
    norm = {"LayerNorm": "layernorm", "RMSNorm": "rmsnorm"}[said.get("normalization")]
    return {"norm": norm, "norm_eps": float(said.get("norm_epsilon"))}


def _positions(said: _Args, longest: int) -> dict[str, Any]:
    kind = "rope" if said.get("use_rotary_position_embeddings") else said.get("position_embedding_type")
    if kind == "learned_absolute" and said.get("add_position_embedding"):
        return {"position_embedding": "learned", "max_position_embeddings": longest}
    if kind != "rope":
        kind = kind if said.get("add_position_embedding") else "none"
        raise ConfigError(
            f"{said.where}: args.position_embedding_type = {_shown(kind)}: the decoder can express learned_absolute "
            "and rope"
        )
    found: dict[str, Any] = {
        "rope_theta": float(said.get("rotary_base")),
        "partial_rotary_factor": float(said.get("rotary_percent")),
    }
    linear, llama3 = said.get("rotary_seq_len_interpolation_factor"), said.get("use_rope_scaling")
    if linear not in (None, 1) and llama3:
        raise ConfigError(
            f"{said.where}: args.use_rope_scaling and args.rotary_seq_len_interpolation_factor = {linear} at once: the "
            "decoder can express one of them"
        )
    if llama3:  # the other three numbers are fixed in Megatron-LM
        found["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": float(said.get("rope_scaling_factor")),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    elif linear not in (None, 1):
        found["rope_scaling"] = {"rope_type": "linear", "factor": float(linear)}
    return found


def _line(fields: Mapping[str, Any], habits: Habits) -> str:
    """The model in a line."""
    heads, groups = fields["num_attention_heads"], fields["num_key_value_heads"]
    words = [
        f"{fields['num_hidden_layers']} layers of {fields['hidden_size']}",
        f"{heads} heads of {fields['head_dim']}" + (f" in {groups} groups" if groups != heads else ""),
        f"{'gated ' if fields['gated_mlp'] else ''}MLP of {fields['intermediate_size']} with {fields['hidden_act']}",
        f"{fields['norm']} ({fields['norm_eps']:g}{', stored as its difference from 1' if habits.norm_plus else ''})",
        f"rotary base {fields['rope_theta']:g}" if "rope_theta" in fields else "learned positions",
        "tied head" if fields["tie_word_embeddings"] else "head of its own",
    ]
    if habits.interleaved:
        words.append("interleaved rotary pairs, put in our order")
    return ", ".join(words)
