"""What decides how much a forward pass keeps: sizes on one rank, and which implementations run. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from megatron.config.kernel_checks import compiling_obstacle, splits_backward
from megatron.config.layout import Layout
from megatron.config.layout_sizes import gathers_keys
from megatron.config.model_shape import ModelShape
from megatron.config.schema import KernelsSection, ParallelSection

DeviceKind = Literal["gpu", "cpu"]
COMPUTE_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "auto": 2}
"""Of an element in the forward pass, by precision; "auto" as bf16, which GPUs have."""


@dataclass(frozen=True)
class ForwardPass:
    """One microbatch of `rows` rows through one rank's part of a model.

    length: positions of a row, all of them. tensor, sequence, context: of `[parallel]`. gathers: context ranks gather
    keys and values, else they exchange heads. split: gradients of inputs and of weights are computed apart. recompute:
    none, attention, operations or full. narrow, wide: bytes of an element of activations, and of statistics. joined:
    query, key and value are one product, and gate and up (one process). attention: a backend's name, "flash" for
    torch's SDPA without a mask on a GPU. lean: what is elementwise keeps its inputs alone (Triton's kernels, and
    compiled formulas); else each operation keeps its own. lean_loss: the loss widens nothing. in_place: queries and
    keys are turned where the joined product put them. fp8: products of layers keep casts of 8 bits. divided: documents
    begin within rows, which makes masks larger. device: cpu or gpu.
    """

    rows: int
    length: int
    tensor: int = 1
    sequence: bool = False
    context: int = 1
    gathers: bool = False
    split: bool = False
    recompute: Literal["none", "attention", "operations", "full"] = "none"
    narrow: int = 2
    wide: int = 4
    joined: bool = False
    attention: str = "flash"
    lean: bool = True
    lean_loss: bool = True
    in_place: bool = True
    fp8: bool = False
    divided: bool = False
    device: DeviceKind = "gpu"

    @property
    def positions(self) -> int:
        """Rows x positions that this rank's attention and MLP see."""
        return self.rows * (self.length // self.context)

    @property
    def residual_positions(self) -> int:
        """Rows x positions of the residual stream on this rank."""
        return self.positions // (self.tensor if self.sequence else 1)


def heads_here(shape: ModelShape, tensor: int) -> tuple[int, int]:
    """Query heads and key-value heads that a tensor rank computes; where ranks are more than key-value heads, one."""
    return shape.num_attention_heads // tensor, max(1, shape.num_key_value_heads // tensor)


@lru_cache(maxsize=4096)
def _chosen(
    attention: str,
    activation: str,
    rope: str,
    loss: str,
    compiled: bool,
    device: DeviceKind,
    documents: bool,
) -> tuple[str, bool, bool, bool]:
    on_gpu = device == "gpu"
    if attention == "auto":
        attention = ("varlen" if documents else "flash") if on_gpu else "blockwise"
    elif attention == "sdpa" and on_gpu and not documents:
        attention = "flash"
    lean = compiled or activation in ("triton", "compile") or (activation == "auto" and on_gpu)
    in_place = rope != "compile" and not compiled
    return attention, lean, loss == "triton" or (loss == "auto" and on_gpu), in_place


def forward_pass(
    shape: ModelShape,
    section: ParallelSection,
    layout: Layout,
    precision: str,
    rows: int,
    length: int,
    kernels: KernelsSection | None = None,
    device: DeviceKind = "gpu",
) -> ForwardPass:
    """Of a layout's ranks, for microbatches of `rows` rows. precision: a name of train.precision.

    What `[kernels]` leaves to measurement ("auto"), which a plan cannot know, is taken to keep what the usual winner
    keeps: on a GPU attention by torch's flash kernels and fused elementwise operations, on a CPU the definitions.
    """
    asked = kernels or KernelsSection()
    compiled = asked.compile == "layers" or (
        asked.compile == "auto" and device == "gpu" and compiling_obstacle(section, shape) is None
    )
    attention, lean, lean_loss, in_place = _chosen(
        asked.attention,
        asked.activation,
        asked.rope,
        asked.cross_entropy,
        compiled,
        device,
        shape.document_mask or shape.window_bites(length),
    )
    if attention == "varlen" and shape.window_bites(length):
        attention = "flex"
    split = splits_backward(section)
    recompute = section.recompute_policy if section.recompute == "selective" else section.recompute
    narrow = COMPUTE_BYTES[precision]
    return ForwardPass(
        rows=rows,
        length=length,
        tensor=section.tensor,
        sequence=section.sequence,
        context=section.context,
        gathers=section.context > 1 and gathers_keys(section, shape),
        split=split,
        recompute=recompute,
        narrow=narrow,
        wide=max(4, narrow),
        joined=layout.world_size == 1 and not split and not asked.fp8,
        attention=attention,
        lean=lean,
        lean_loss=lean_loss,
        in_place=in_place,
        fp8=asked.fp8,
        divided=shape.document_mask,
        device=device,
    )
