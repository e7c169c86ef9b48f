"""Every launch that is compiled ahead: calls of the kernels' doors on meta tensors at the sizes of real models."""

from __future__ import annotations

from collections.abc import Callable

from kernels import ahead_cross_entropy, ahead_norms, ahead_optimizer, ahead_pointwise, ahead_softmax

CASES: dict[str, Callable[[], object]] = {
    **ahead_norms.CASES,
    **ahead_pointwise.CASES,
    **ahead_cross_entropy.CASES,
    **ahead_softmax.CASES,
    **ahead_optimizer.CASES,
}
"""By a name of its own."""
