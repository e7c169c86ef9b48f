"""Master weights of one process in float32 (or 64) and, for bfloat16, the copy that computes.

The copy is cast once a step, not once a use; its gradients are added to the masters' in float32 after each microbatch,
or, where memory asks for it (`train.gradients = "bf16"`), kept and added up as narrow as they are: 16 bytes a parameter
through a step instead of 20.
All of it is narrow, norms too, as FSDP2's copies are on many ranks: the layout changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron.engines.held import Held
from megatron.models.decoder import Decoder
from megatron.models.joined import join


class MasterWeights:
    """`held`: the masters. `modules`: what runs forward and backward."""

    def __init__(self, master: Decoder, compute_dtype: torch.dtype, narrow_gradients: bool = False) -> None:
        if _may_join(master):
            join(master)
        self._parameters: dict[str, nn.Parameter] = dict(master.named_parameters())
        self._wide: list[nn.Parameter] = []
        self._narrow: list[nn.Parameter] = []
        model = master
        if any(p.dtype != compute_dtype for p in master.parameters()):
            model = self._copy(master, compute_dtype)
        self.modules: Sequence[nn.Module] = (model,)
        self._narrow_gradients = narrow_gradients and bool(self._narrow)
        computing = dict(model.named_parameters()) if self._narrow_gradients else self._parameters
        self.held = [_hold(name, parameter, computing[name]) for name, parameter in self._parameters.items()]

    def _copy(self, master: Decoder, dtype: torch.dtype) -> Decoder:
        with torch.device("meta"):
            copy = Decoder(master.shape, master.kernels, master.place, master.seed)
        copy.objective = master.objective
        for prefix, module in copy.named_modules():
            for name in [name for name, _ in module.named_parameters(recurse=False)]:
                wide = self._parameters[f"{prefix}.{name}"]
                narrow = nn.Parameter(wide.detach().to(dtype))
                setattr(module, name, narrow)
                self._wide.append(wide)
                self._narrow.append(narrow)
        if _may_join(copy):
            join(copy)
        return copy

    def before_backward(self, last: bool) -> None:
        """Nothing to do."""

    @torch.no_grad()
    def collect(self) -> None:
        """Adds the copy's gradients to the masters' and drops them, after each backward pass."""
        if self._narrow_gradients:
            return
        for wide, narrow in zip(self._wide, self._narrow, strict=True):
            if narrow.grad is not None:
                _add(narrow, wide)

    def computing(self) -> Sequence[nn.Parameter]:
        """The narrow copies, in order."""
        return self._narrow

    @torch.no_grad()
    def add(self, gradients: Sequence[Tensor], scale: float) -> None:
        """Adds scale x gradients, by narrow copy, to the masters'."""
        for wide, gradient in zip(self._wide, gradients, strict=True):
            if wide.grad is None:
                wide.grad = gradient.to(wide.dtype).mul_(scale)
            else:
                wide.grad.add_(gradient, alpha=scale)

    def collect_at_once(self) -> None:
        """From now on each gradient is added as soon as it is there: a pipeline runs many microbatches in one call."""
        for wide, narrow in zip(self._wide, self._narrow, strict=True):
            narrow.register_post_accumulate_grad_hook(lambda part, wide=wide: _add(part, wide))

    def copies(self) -> dict[str, Tensor]:
        """What computes, by parameter name, where it is not the masters themselves."""
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        return {names[id(wide)]: narrow.detach() for wide, narrow in zip(self._wide, self._narrow, strict=True)}

    @torch.no_grad()
    def refresh(self) -> None:
        """Casts the masters into the copy, after they have changed."""
        if self._narrow:
            torch._foreach_copy_(self._narrow, [p.detach() for p in self._wide])

    def drop_gradients(self) -> None:
        """Forgets all gradients."""
        for parameter in (*self._parameters.values(), *self._narrow):
            parameter.grad = None


def _may_join(model: Decoder) -> bool:
    return model.place.tensor.alone and not model.place.split_backward and not model.kernels.fp8


def _add(narrow: nn.Parameter, wide: nn.Parameter) -> None:
    assert narrow.grad is not None
    if wide.grad is None:
        wide.grad = narrow.grad.to(wide.dtype)
    else:
        wide.grad.add_(narrow.grad)
    narrow.grad = None


def _hold(name: str, parameter: nn.Parameter, computing: nn.Parameter) -> Held:
    shape = tuple(parameter.shape)
    local = parameter.detach()

    def gradient() -> Tensor | None:
        return computing.grad

    return Held(name, local, shape, (0,) * len(shape), True, False, False, gradient)
