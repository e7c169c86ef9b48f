"""Which implementation of each operation a model is made of: chosen once, and handed to the model's parts.

eager: the definition, in torch's own operations. compile: plain formulas, fused by torch.compile (`compiled.py`).
triton: the handwritten kernels (`*_triton.py`), which promise to equal the definitions. Libraries are imported where a
choice first asks for them, so that a run on CPUs never loads Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from megatron.kernels.attention import AttentionBackend
from megatron.kernels.fp8 import Cast, Fp8Weight
from megatron.kernels.matrix_product import Library

Backend = Literal["eager", "compile", "triton"]
BACKENDS: tuple[str, ...] = get_args(Backend)


@dataclass(frozen=True)
class Kernels:
    """The choice for every operation. compile_layers: each layer is compiled as a whole, in which case what is
    "compile" is fused with its neighbours. cuda_graphs: microbatches are recorded once and replayed. fp8: products of
    layers run in 8 bits, forward and backward. weight_gradients: "fused" where layers' products add them in float32
    by themselves (`weight_gradient.py`).
    """

    attention: AttentionBackend = "blockwise"
    norm: Backend = "eager"
    rope: Backend = "eager"
    activation: Backend = "eager"
    cross_entropy: Literal["eager", "triton"] = "eager"
    product: Library = "torch"
    compile_layers: bool = False
    cuda_graphs: bool = False
    fp8: bool = False
    weight_gradients: Literal["separate", "fused"] = "separate"

    def words(self) -> str:
        """For people: "norm triton, rope compile, activation eager, cross-entropy triton"."""
        names = {"norm": self.norm, "rope": self.rope, "activation": self.activation}
        parts = [f"{op} {name}" for op, name in names.items()] + [f"cross-entropy {self.cross_entropy}"]
        parts += ["products by oneDNN"] * (self.product == "onednn")
        parts += ["layers compiled"] * self.compile_layers + ["CUDA graphs"] * self.cuda_graphs
        parts += ["fp8 products"] * self.fp8
        parts += ["weight gradients added in their products"] * (self.weight_gradients == "fused")
        return ", ".join(parts)


class Norms(NamedTuple):
    """x, weight and eps as in `rms_norm.py`, with bias (or None) as in `layer_norm.py`; add_*: (normed, x + branch)."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    layer_norm: Callable[[Tensor, Tensor, Tensor | None, float], Tensor]
    add_layer_norm: Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]]


class Ropes(NamedTuple):
    """As in `rope.py`. fused: `rope_fused_`, in the memory of a joined projection; None where that would hinder."""

    qk: Callable[..., tuple[Tensor, Tensor]]
    fused: Callable[..., Tensor] | None


class Activations(NamedTuple):
    """As in `swiglu.py`."""

    activate: Callable[[Tensor, str], Tensor]
    gated: Callable[[Tensor, Tensor, str], Tensor]
    gated_halves: Callable[[Tensor, str], Tensor]


@cache
def norms(backend: Backend) -> Norms:
    """The norms of a backend."""
    if backend == "triton":
        from megatron.kernels.layer_norm_triton import add_layer_norm_triton, layer_norm_triton
        from megatron.kernels.rms_norm_triton import add_rms_norm_triton, rms_norm_triton

        return Norms(rms_norm_triton, add_rms_norm_triton, layer_norm_triton, add_layer_norm_triton)
    if backend == "compile":
        from megatron.kernels import compiled

        return Norms(compiled.rms_norm, compiled.add_rms_norm, compiled.layer_norm, compiled.add_layer_norm)
    from megatron.kernels.layer_norm import add_layer_norm, layer_norm
    from megatron.kernels.rms_norm import add_rms_norm, rms_norm

    return Norms(rms_norm, add_rms_norm, layer_norm, add_layer_norm)


@cache
def ropes(backend: Backend) -> Ropes:
    """The rotary positions of a backend."""
    if backend == "triton":
        from megatron.kernels.rope_triton import rope_fused_triton_, rope_qk_triton

        return Ropes(rope_qk_triton, rope_fused_triton_)
    if backend == "compile":
        from megatron.kernels.compiled import rope_qk as compiled_rope_qk

        return Ropes(compiled_rope_qk, None)
    from megatron.kernels.rope import rope_fused_, rope_qk

    return Ropes(rope_qk, rope_fused_)


@cache
def fp8_products(cast: Literal["eager", "triton"]) -> Callable[[Tensor, Tensor, Fp8Weight | None], Tensor]:
    """`fp8_linear` by either cast: (x, weight, its cast or None) -> x times the transpose of weight."""
    if cast == "triton":
        from megatron.kernels.fp8_triton import fp8_linear_triton

        return fp8_linear_triton
    from megatron.kernels.fp8 import fp8_linear

    return fp8_linear


@cache
def fp8_casts(cast: Literal["eager", "triton"]) -> Cast:
    """`fp8_cast` by either."""
    if cast == "triton":
        from megatron.kernels.fp8_triton import fp8_cast_triton

        return fp8_cast_triton
    from megatron.kernels.fp8 import fp8_cast

    return fp8_cast


@cache
def activations(backend: Backend) -> Activations:
    """The activations of a backend."""
    if backend == "triton":
        from megatron.kernels.swiglu_triton import activate_triton, gated_halves_triton, gated_triton

        return Activations(activate_triton, gated_triton, gated_halves_triton)
    if backend == "compile":
        from megatron.kernels import compiled

        return Activations(compiled.activate, compiled.gated, compiled.gated_halves)
    from megatron.kernels.swiglu import activate, gated, gated_halves

    return Activations(activate, gated, gated_halves)
