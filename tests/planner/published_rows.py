"""Training throughput that others have published, with the layouts that they say, as configs of ours.

Only what stands at the source is copied; what a source leaves open is filled in the same way for all of its rows, and
said in SOURCES.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron.config.layout import Layout, resolve_layout
from megatron.config.layout_checks import BatchShape
from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.schema import ModelSection, OptimizerSection, ParallelSection, TrainSection
from megatron.planner.hardware import HARDWARE, Accelerator, Efficiency
from megatron.planner.step_time import StepTime, step_time

GPT: dict[str, Any] = {
    "hidden_act": "gelu",
    "gated_mlp": False,
    "norm": "layernorm",
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Row:
    """source: a key of SOURCES. model: fields of [model]. gpus, batch: sequences in a step. micro: in a microbatch.
    tokens: tokens a second and GPU, published, or from published operations a second by the source's own count.
    fitted: whether the default constants were chosen with it."""

    source: str
    name: str
    device: Accelerator
    model: dict[str, Any]
    length: int
    gpus: int
    batch: int
    micro: int
    parallel: dict[str, Any]
    tokens: float
    fitted: bool = False
    gradients: Literal["fp32", "bf16"] = "fp32"

    def shape(self) -> ModelShape:
        """Resolved."""
        return resolve_model(ModelSection(seq_length=self.length, **self.model), 1)

    def layout(self) -> tuple[ParallelSection, Layout]:
        """Resolved."""
        section = ParallelSection(**self.parallel)
        return section, resolve_layout(section, self.gpus)

    def predicted(self, efficiency: Efficiency | None = None) -> StepTime:
        """By the planner."""
        section, layout = self.layout()
        train = TrainSection(
            global_batch_size=self.batch, micro_batch_size=self.micro, precision="bf16", gradients=self.gradients
        )
        batch = BatchShape(self.length, self.batch)
        return step_time(self.shape(), section, layout, train, OptimizerSection(), batch, self.device, efficiency)


SOURCES = {
    "Megatron-LM": "github.com/NVIDIA/Megatron-LM, README.md, images/model_table.png (Megatron-Core r0.8.0, H100): "
    "heads, hidden size, layers, tensor, pipeline and data sizes, batch, TFLOP/s a GPU; T 4096, 131,072 words. Its "
    "operations count the whole attention matrix (num_floating_point_operations of July 2024). Open at the source "
    "and taken as: one sequence a microbatch, optimizer sharded (its --overlap-param-gather needs that), gradients "
    "reduced in bf16, sequence parallel, interleaved with one layer a stage, untied head (so parameters are those of "
    "the table).",
    "Llama 3": "arXiv 2407.21783, table 4: GPUs, TP, CP, PP, DP, sequence, batch, TFLOP/s a GPU; no recompute, weights "
    "kept after the forward pass, gradients reduced in fp32 (section 3.3.2). Taken as: one sequence a microbatch, four "
    "stages a rank, operations counted with the whole attention matrix.",
    "llm-foundry": "github.com/mosaicml/llm-foundry, scripts/train/benchmarking/README.md: tokens a second and GPU, "
    "microbatch, batch, FULL_SHARD, recompute; shapes of scripts/train/yamls/pretrain. Nothing compiled, and attention "
    "by a Triton kernel of 2023. Network of the H100s not said; taken as 400 Gb/s a GPU.",
    "torchtitan": "github.com/pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3: FSDP "
    "and torch.compile in bf16, selective recompute, H100 of 2.4 TB/s held to 500 W, 400 Gb/s.",
    "llmq": "github.com/IST-DASLab/llmq, README.md, H100: one GPU, bf16, rows of 1024, eight microbatches; its "
    "optimizer state is bf16.",
}


def _megatron(name: str, heads: int, hidden: int, layers: int, t: int, p: int, batch: int, tflops: float) -> Row:
    model = GPT | {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "intermediate_size": 4 * hidden,
        "vocab_size": 131072,
    }
    parallel: dict[str, Any] = {"tensor": t, "sequence": t > 1, "pipeline": p, "data_shard": "optimizer"}
    if p > 1:
        parallel |= {"schedule": "interleaved", "virtual": layers // p}
    row = Row("Megatron-LM", name, HARDWARE["h100"], model, 4096, 48 * t * p, batch, 1, parallel, 0.0, True, "bf16")
    return replace(row, tokens=tflops * 1e12 / row.shape().flops_per_token(4096, causal=False))


def _llama(gpus: int, data: int, each: int, tflops: float) -> Row:
    model = {
        "hidden_size": 16384,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "num_hidden_layers": 126,
        "intermediate_size": 53248,
        "vocab_size": 128256,
    }
    parallel = {"tensor": 8, "sequence": True, "pipeline": 16, "schedule": "interleaved", "virtual": 4}
    parallel |= {"data_shard": "optimizer"}
    name = f"405B, {gpus} GPUs"
    row = Row("Llama 3", name, HARDWARE["h100"], model, 8192, gpus, data * each, 1, parallel, 0.0)
    return replace(row, tokens=tflops * 1e12 / row.shape().flops_per_token(8192, causal=False))


MPT = {
    "760m": (1536, 12, 24),
    "1b": (2048, 16, 24),
    "3b": (2560, 32, 32),
    "7b": (4096, 32, 32),
    "13b": (5120, 40, 40),
    "30b": (7168, 56, 48),
    "70b": (8192, 64, 80),
}
"""Hidden size, heads, layers."""


def _mpt(device: str, size: str, length: int, gpus: int, micro: int, steps: int, again: bool, tokens: float) -> Row:
    hidden, heads, layers = MPT[size]
    model = GPT | {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "intermediate_size": 4 * hidden,
        "vocab_size": 50368,
        "position_embedding": "learned",
        "tie_word_embeddings": True,
    }
    parallel: dict[str, Any] = {"data_shard": "full", "recompute": "full" if again else "none"}
    name = f"{size}, T {length}, {gpus} {device}"
    batch, source = micro * steps * gpus, f"llm-foundry, {device.upper()}"
    fitted = device == "a100" and length == 2048 and not again
    return Row(source, name, HARDWARE[device], model, length, gpus, batch, micro, parallel, tokens, fitted)


QWEN = {
    "0.5B": (896, 24, 14, 2, 4864, 151936),
    "1.5B": (1536, 28, 12, 2, 8960, 151936),
    "3B": (2048, 36, 16, 2, 11008, 151936),
    "7B": (3584, 28, 28, 4, 18944, 152064),
}
"""Qwen2.5: hidden size, layers, heads, key-value heads, intermediate size, words (huggingface.co/Qwen, config.json)."""


def _qwen(size: str, rows: int, tokens: float) -> Row:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    *sizes, words = QWEN[size]
    model = dict(zip(names, sizes, strict=True)) | {"vocab_size": words, "query_key_value_bias": True}
    model["tie_word_embeddings"] = size != "7B"
    return Row("llmq", f"{size}, 1 GPU", HARDWARE["h100"], model, 1024, 1, 8 * rows, rows, {}, tokens)


GRAND_TETON = replace(HARDWARE["h100"], name="H100 at 500 W", memory_bandwidth=2.4e12)
_LLAMA_8B = {"preset": "llama-8b", "vocab_size": 128256}
_SELECTIVE = {"data_shard": "full", "recompute": "selective", "recompute_policy": "operations"}

ROWS = (
    _megatron("1.7B", 16, 2048, 24, 1, 1, 192, 408.8),
    _megatron("7.1B", 32, 4096, 30, 2, 1, 192, 465.9),
    _megatron("16B", 48, 6144, 32, 4, 1, 192, 489.1),
    _megatron("32B", 56, 7168, 48, 8, 1, 192, 459.6),
    _megatron("70B", 64, 8192, 84, 8, 2, 384, 419.7),
    _megatron("119B", 80, 10240, 92, 8, 4, 768, 420.5),
    _megatron("177B", 96, 12288, 96, 8, 6, 1152, 432.8),
    _megatron("314B", 128, 16384, 96, 8, 8, 1536, 474.4),
    _megatron("462B", 144, 18432, 112, 8, 16, 3072, 459.9),
    _llama(8192, 64, 32, 430),
    _llama(16384, 128, 16, 400),
    Row("torchtitan", "8B, 8 GPUs", GRAND_TETON, _LLAMA_8B, 8192, 8, 16, 2, _SELECTIVE, 6667),
    Row("torchtitan", "8B, 128 GPUs", GRAND_TETON, _LLAMA_8B, 8192, 128, 256, 2, _SELECTIVE, 6514),
    _qwen("0.5B", 32, 144e3),
    _qwen("1.5B", 16, 58e3),
    _qwen("3B", 8, 30e3),
    _qwen("7B", 4, 14e3),
    _mpt("h100", "1b", 2048, 8, 14, 1, False, 45455),
    _mpt("h100", "1b", 8192, 8, 3, 4, False, 29157),
    _mpt("h100", "3b", 2048, 64, 6, 3, False, 22525),
    _mpt("h100", "3b", 4096, 8, 5, 6, False, 20964),
    _mpt("h100", "7b", 2048, 8, 6, 1, False, 10643),
    _mpt("h100", "7b", 8192, 8, 8, 2, True, 6935),
    _mpt("h100", "13b", 2048, 64, 2, 1, False, 4800),
    _mpt("h100", "30b", 2048, 32, 14, 3, True, 2308),
    _mpt("h100", "70b", 2048, 64, 8, 4, True, 1039),
    _mpt("a100", "760m", 2048, 8, 24, 2, False, 32434),
    _mpt("a100", "1b", 2048, 8, 14, 4, False, 20513),
    _mpt("a100", "3b", 2048, 8, 10, 2, False, 10811),
    _mpt("a100", "3b", 8192, 8, 3, 6, False, 7695),
    _mpt("a100", "7b", 2048, 8, 6, 2, False, 4641),
    _mpt("a100", "13b", 2048, 8, 2, 3, False, 2262),
    _mpt("a100", "30b", 2048, 8, 3, 21, True, 916),
    _mpt("a100", "70b", 2048, 64, 8, 4, True, 410),
)
