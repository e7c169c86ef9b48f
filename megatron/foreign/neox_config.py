"""What a GPT-NeoX config says of a model, as keys of our [model] table; what the decoder cannot express is refused.

Keys and defaults are those of megatron/neox_arguments/neox_args.py there. The configs are YAML, read by PyYAML's safe
loader, which makes plain data only.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.config.errors import CheckpointError, ConfigError, UnavailableError
from megatron.foreign.padding import DIVISIBLE_BY

_MOST_BYTES = 4 * 2**20
_ACTIVATIONS = {
    "gelu": ("gelu", False),
    "geglu": ("gelu", True),
    "swiglu": ("silu", True),
    "silu": ("silu", False),
    "swish": ("silu", False),
}
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_qk_layernorm": ((False, None), "norms over all of a rank's queries and keys"),
    "sliding_window_width": ((None,), "attention in a sliding window"),
    "moe_num_experts": ((None, 0, 1), "a mixture of experts"),
    "num_unique_layers": ((None,), "layers that share weights"),
    "opt_pos_emb_offset": ((None, 0), "learned positions with an offset"),
    "use_mup": ((None, False), "multipliers of muP"),
    "te_mha": ((None, False), "Transformer Engine's layers"),
    "te_fp8_mha": ((None, False), "Transformer Engine's layers"),
    "te_layernorm_mlp": ((None, False), "Transformer Engine's layers"),
    "te_columnparallel": ((None, False), "Transformer Engine's layers"),
    "te_rowparallel": ((None, False), "Transformer Engine's layers"),
    "use_bnb_optimizer": ((None, False), "an embedding with a norm"),
    "output_layer_parallelism": ((None, "column"), "a head cut by inputs"),
}
"""Keys that change what is computed or how it lies, the values that can be imported, what the others ask for."""
READ = frozenset(
    (
        *_ONLY,
        *("num_layers", "hidden_size", "num_attention_heads", "num_kv_heads", "max_position_embeddings", "seq_length"),
        *("activation", "bias_gelu_fusion", "norm", "layernorm_epsilon", "rms_norm_epsilon"),
        *("gpt_j_residual", "gpt_j_tied", "no_weight_tying", "init_method_std"),
        *("pos_emb", "rotary_emb_base", "rotary_pct", "attention_config", "soft_prompt_tuning"),
        *("model_parallel_size", DIVISIBLE_BY),
    )
)
"""Every key that has a meaning here."""
_NORMS = {"layernorm": "layernorm", "te_layernorm": None, "rmsnorm": "rmsnorm"}
_PLAIN_ATTENTION = ("global", "flash")


def read_configs(paths: Sequence[Path]) -> dict[str, Any]:
    """All keys of the configs together, with underscores for dashes.

    Raises CheckpointError for files that are no YAML tables, or that contradict each other.
    """
    try:
        yaml = importlib.import_module("yaml")
    except ImportError as error:
        raise UnavailableError(
            f"GPT-NeoX' configs are YAML, and PyYAML cannot be imported ({error}): pip install pyyaml"
        ) from None
    found: dict[str, Any] = {}
    home: dict[str, Path] = {}
    for path in paths:
        try:
            if path.stat().st_size > _MOST_BYTES:
                raise CheckpointError(f"{path}: has more than {_MOST_BYTES} bytes, which no config has")
            table = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
            raise CheckpointError(f"{path}: not a YAML config: {str(error)[:200]}") from None
        if not isinstance(table, dict):
            raise CheckpointError(f"{path}: not a YAML table, but {type(table).__name__}")
        for key, value in table.items():
            name = str(key).replace("-", "_")
            if name in found and found[name] != value:
                raise CheckpointError(f"{path}: {name} is {value!r:.60}, and {found[name]!r:.60} in {home[name]}")
            found[name], home[name] = value, path
    return found


def config_paths(folder: Path, given: Sequence[Path]) -> list[Path]:
    """The configs to read: given, or those that the trainer left in the step's folder. Raises ConfigError for none."""
    if given:
        return [Path(path) for path in given]
    there = sorted(path for path in (folder / "configs").glob("*") if path.suffix in (".yml", ".yaml", ".json"))
    if not there:
        raise ConfigError(
            f"{folder}: has no configs/*.yml, so the model's shape is not known: give the run's configs with --config"
        )
    return there


def fields_of_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Keys of the [model] table but for the MLP's width and biases, which the weights show.

    Raises ConfigError naming every key that the decoder cannot express.
    """
    _refuse(config, where)
    heads, hidden = _count(config, "num_attention_heads", where), _count(config, "hidden_size", where)
    longest = _count(config, "max_position_embeddings", where)
    act, gated = _ACTIVATIONS[config.get("activation") or "gelu"]
    if act == "gelu" and not gated and config.get("bias_gelu_fusion"):
        act = "gelu_tanh"  # their fused kernel computes this one
    norm = _NORMS[config.get("norm") or "layernorm"]
    eps = ("layernorm_epsilon", 1e-5) if norm == "layernorm" else ("rms_norm_epsilon", 1e-8)
    fields: dict[str, Any] = {
        "seq_length": min(int(config.get("seq_length") or longest), longest),
        "hidden_size": hidden,
        "num_hidden_layers": _count(config, "num_layers", where),
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("num_kv_heads") or heads,
        "head_dim": hidden // heads,
        "hidden_act": act,
        "gated_mlp": gated,
        "norm": norm,
        "norm_eps": float(config.get(eps[0]) or eps[1]),
        "parallel_block": bool(config.get("gpt_j_residual")),
        "tie_word_embeddings": not config.get("no_weight_tying"),
        "initializer_range": float(config.get("init_method_std") or 0.02),
    }
    if (config.get("pos_emb") or "learned") == "learned":
        return fields | {"position_embedding": "learned", "max_position_embeddings": longest}
    return fields | {
        "rope_theta": float(config.get("rotary_emb_base") or 10000),
        "partial_rotary_factor": float(config.get("rotary_pct") or 1.0),
    }


def _refuse(config: Mapping[str, Any], where: str) -> None:
    faults = [
        f"{key} = {value!r:.60}: {why}"
        for key, (values, why) in _ONLY.items()
        if (value := config.get(key, values[0])) not in values
    ]
    if (activation := config.get("activation") or "gelu") not in _ACTIVATIONS:
        faults.append(f"activation = {activation!r:.60}: there are {', '.join(_ACTIVATIONS)}")
    if _NORMS.get(norm := config.get("norm") or "layernorm") is None:
        faults.append(f"norm = {norm!r:.60}: there are layernorm and rmsnorm")
    if (positions := config.get("pos_emb") or "learned") not in ("learned", "rotary"):
        faults.append(f"pos_emb = {positions!r:.60}: there are learned and rotary")
    if config.get("gpt_j_residual") and config.get("gpt_j_tied"):
        faults.append("gpt_j_tied = True: one norm for attention and MLP")
    for kinds, _ in config.get("attention_config") or []:
        odd = [kind for kind in kinds if kind not in _PLAIN_ATTENTION]
        faults += [f"attention_config has {kind!r:.60}: there are {', '.join(_PLAIN_ATTENTION)}" for kind in odd]
    prompt = config.get("soft_prompt_tuning")
    if isinstance(prompt, dict) and prompt.get("enabled"):
        faults.append("soft_prompt_tuning is on: vectors before the text")
    if faults:
        raise ConfigError("\n  ".join([f"{where}: a model that the decoder cannot express:", *faults]))


def _count(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{where}: {key} is {value!r:.60}, which is no count")
    return value
