"""Activations of the MLP, plain and gated (Shazeer, arXiv 2002.05202, eq. 6).

The plain autograd of these is as fast on CPU as a handwritten backward was (4096 x 704 bfloat16), so it stays.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

_ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def activate(x: Tensor, name: str) -> Tensor:
    """silu, gelu (by the error function) or gelu_tanh of x, elementwise."""
    return _ACTIVATIONS[name](x)


def gated(gate: Tensor, up: Tensor, name: str) -> Tensor:
    """activation(gate) * up; SwiGLU where name is silu."""
    return activate(gate, name) * up


def gated_halves(gate_up: Tensor, name: str) -> Tensor:
    """`gated` of one fused projection [..., 2f], whose first half is the gate and whose second half is up; [..., f].

    Raises ValueError where the last dimension is odd.
    """
    gate, up = halves(gate_up)
    return gated(gate, up, name)


def halves(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Views [..., f] of the two halves of [..., 2f]. Raises ValueError where the last dimension is odd."""
    inner, odd = divmod(gate_up.shape[-1], 2)
    if odd:
        raise ValueError(f"a gate and an up projection side by side have an even size, not {gate_up.shape[-1]}")
    return gate_up[..., :inner], gate_up[..., inner:]
