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
