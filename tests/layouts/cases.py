"""Layouts, optimizers and precisions that must all give the one-process curve. A layout is one line of LAYOUTS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron.config.partition import stage_count
from megatron.config.schema import OptimizerSection, ParallelSection


@dataclass(frozen=True)
class Variant:
    """An optimizer and a kind of model. lr: what the config's rate is multiplied by; tolerance: relative, in fp32."""

    name: str
    section: OptimizerSection
    lr: float
    tolerance: float
    model: Mapping[str, Any] = field(default_factory=dict)


TIED: dict[str, Any] = {"tie_word_embeddings": True}
BIASED: dict[str, Any] = {
    "norm": "layernorm",
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": False,
    "hidden_dropout": 0.1,
}
CLIP = 2.5
"""The bound of "sgd, clipped": some steps' norms are above it and some below, which a test checks."""

VARIANTS = (
    # without clipping, a gradient that is wrong by a factor shows in the curve
    Variant("sgd", OptimizerSection(name="sgd", clip_grad_norm=0.0), 20.0, 1e-5, TIED),
    Variant("sgd, clipped", OptimizerSection(name="sgd", momentum=0.5, clip_grad_norm=CLIP), 8.0, 1e-5, BIASED),
    Variant("adamw", OptimizerSection(clip_grad_norm=1.0, weight_decay=0.1), 0.4, 1e-4, TIED),
)
COHERE = {"norm": "layernorm_no_bias", "parallel_block": True, "shared_norm": True}
_PLAIN = OptimizerSection(name="sgd", clip_grad_norm=0.0)
FAMILIES = (
    Variant("qwen2", _PLAIN, 20.0, 1e-5, TIED | {"query_key_value_bias": True}),
    Variant("qwen3", _PLAIN, 20.0, 1e-5, TIED | {"qk_norm": "head", "head_dim": 16}),
    Variant("olmo2", _PLAIN, 8.0, 1e-5, {"qk_norm": "width", "norm_place": "after"}),
    Variant("gpt2", _PLAIN, 8.0, 1e-5, BIASED | TIED | {"position_embedding": "learned", "gated_mlp": False}),
    Variant(
        "gemma3",
        _PLAIN,
        4.0,
        1e-5,
        TIED
        | {"norm_place": "both", "norm_unit_offset": True, "qk_norm": "head", "embedding_multiplier": 4.0}
        | {"sliding_window": 5, "sliding_pattern": 2, "rope_local_theta": 100.0},
    ),
    Variant("cohere", _PLAIN, 20.0, 1e-5, TIED | COHERE | {"logit_multiplier": 0.5}),
)
"""What other model families than Llama's and NeoX' are made of."""
VARIANT = {variant.name: variant for variant in (*VARIANTS, *FAMILIES)}


Key = tuple[str, str]
"""Precision, and a variant's name."""


def tolerance(key: Key) -> float:
    """The greatest relative error that is still rounding (law T1)."""
    return 1e-9 if key[0] == "fp64" else VARIANT[key[1]].tolerance


@dataclass(frozen=True)
class LayoutCase:
    """So many processes under `[parallel]`. kernels: fields of Kernels that are not the definitions'. only: the keys
    that are run; default all that make sense.
    """

    name: str
    ranks: int
    parallel: Mapping[str, Any]
    kernels: Mapping[str, Any] = field(default_factory=dict)
    only: tuple[Key, ...] = ()
    depth: int = 0

    @property
    def section(self) -> ParallelSection:
        return ParallelSection(**self.parallel)

    @property
    def layers(self) -> int:
        """`depth`, or an odd number, so that no stages are alike; as few as will do, since each takes time."""
        if self.depth:
            return self.depth
        return 5 if stage_count(self.section) > 2 else 3

    @property
    def keys(self) -> tuple[Key, ...]:
        """What is run. DeepSpeed has no float64, and its offload is for AdamW."""
        if self.only:
            return self.only
        wide = self.parallel.get("engine") != "deepspeed"
        names = [v.name for v in VARIANTS if v.name == "adamw" or not self.parallel.get("offload")]
        # what clipping does is the same in both precisions
        narrow = [name for name in names if name != "sgd, clipped" or not wide]
        return (*(("fp64", name) for name in names if wide), *(("fp32", name) for name in narrow))


def _torch(name: str, ranks: int, **parallel: Any) -> LayoutCase:
    return LayoutCase(name, ranks, parallel)


def _deepspeed(name: str, ranks: int, **parallel: Any) -> LayoutCase:
    return LayoutCase(name, ranks, {"engine": "deepspeed"} | parallel)


LAYOUTS = (
    _torch("tp2", 2, tensor=2),
    _torch("tp4", 4, tensor=4),
    _torch("tp2+sp", 2, tensor=2, sequence=True),
    _torch("pp2", 2, pipeline=2),
    _torch("pp4", 4, pipeline=4),
    _torch("pp2 x full shard 2", 4, pipeline=2, data_shard="full"),
    _torch("interleaved pp2x2", 2, pipeline=2, schedule="interleaved", virtual=2),
    _torch("zero-bubble pp2", 2, pipeline=2, schedule="zero-bubble"),
    _torch("zbv pp2", 2, pipeline=2, schedule="zbv"),
    _torch("dp2", 2),
    _torch("optimizer shard 2", 2, data_shard="optimizer"),
    _torch("full shard 2", 2, data_shard="full"),
    _torch("hybrid shard 2x2", 4, data_shard="full", data_replicate=2),
    _torch("cp2 all-to-all", 2, context=2, context_method="all-to-all"),
    _torch("cp2 gather", 2, context=2, context_method="gather"),
    _torch("tp2 x pp2", 4, tensor=2, pipeline=2),
    _torch("tp2 x dp2", 4, tensor=2),
    _torch("pp2 x dp2", 4, pipeline=2),
    _torch("tp2+sp x pp2 x dp2", 8, tensor=2, sequence=True, pipeline=2),
    _deepspeed("deepspeed ZeRO-0 dp2", 2),
    _deepspeed("deepspeed ZeRO-1 dp2", 2, data_shard="optimizer"),
    _deepspeed("deepspeed ZeRO-2 dp2", 2, data_shard="gradients"),
    _deepspeed("deepspeed ZeRO-3 dp2", 2, data_shard="full"),
    _deepspeed("deepspeed tp2 x ZeRO-1 dp2", 4, tensor=2, data_shard="optimizer"),
    _deepspeed("deepspeed pp2 x ZeRO-1 dp2", 4, pipeline=2, data_shard="optimizer"),
    _deepspeed("deepspeed ZeRO-2 dp2 offload", 2, data_shard="gradients", offload="optimizer"),
)
TRITON = {"norm": "triton", "rope": "triton", "activation": "triton", "cross_entropy": "triton"}
COMPILED = {"norm": "compile", "rope": "compile", "activation": "compile", "compile_layers": True}
KERNELS = (
    # Triton's interpreter takes a second for what a GPU does in microseconds; float64 leaves rounding no excuse.
    LayoutCase("tp2+sp, Triton kernels", 2, {"tensor": 2, "sequence": True}, TRITON, (("fp64", "sgd"),), depth=1),
    LayoutCase(
        "full shard 2, compiled layers", 2, {"data_shard": "full"}, COMPILED, (("fp64", "sgd"), ("fp32", "adamw"))
    ),
)
"""Layouts with other kernels than the definitions."""

BY_NAME = {case.name: case for case in LAYOUTS}

ONE_PROCESS = LayoutCase("one process", 1, {})
