"""Muon for the matrices of layers, AdamW for everything else, as one optimizer.

Muon's step has about the same size in every direction of a matrix: momentum made orthogonal by five Newton-Schulz
steps, which torch computes in bfloat16 whatever the weights' dtype. One learning rate serves both parts: Muon's is
scaled by 0.2 x sqrt(max(rows, columns)), torch's "match_rms_adamw", which gives its update the root mean square that
AdamW's has (Moonshot, arXiv:2502.16982), so that a rate and a weight decay tuned for AdamW can stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer

from megatron.config.schema import OptimizerSection
from megatron.optim.groups import is_layer_matrix, parameter_groups


class MuonAndAdamW(Optimizer):
    """Groups and state of both parts are this object's: whoever sets "lr" in every group sets it for both.

    Muon's parameters have "momentum_buffer" as state, the others AdamW's.
    """

    def __init__(self, parameters: Mapping[str, Tensor], section: OptimizerSection) -> None:
        """parameters: whole local tensors by global name. A rank may lack either kind, as the last pipeline stage's
        rank that holds no layer does."""
        matrices = {name: p for name, p in parameters.items() if is_layer_matrix(name, p.ndim)}
        others = {name: p for name, p in parameters.items() if name not in matrices}
        self._parts: list[Optimizer] = []
        if matrices:
            muon = Muon(
                list(matrices.values()),
                lr=0.0,
                weight_decay=section.weight_decay,
                momentum=section.muon_momentum,
                nesterov=True,
                adjust_lr_fn="match_rms_adamw",
            )
            self._parts.append(muon)
        if groups := parameter_groups(others.items(), section.weight_decay):
            self._parts.append(AdamW(groups, lr=0.0, betas=section.betas, eps=section.eps, fused=True))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        for part in self._parts:
            part.state = self.state

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """One update of both parts; no closure is called."""
        for part in self._parts:
            part.step()
