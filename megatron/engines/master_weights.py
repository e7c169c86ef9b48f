"""Master weights of one process in float32 (or 64) and, for bfloat16, the copy that computes.

The copy is cast once a step, not once a use; its gradients are added to the masters' in float32 after each microbatch,
or, where memory asks for it (`train.gradients = "bf16"`), kept and added up as narrow as they are: 16 bytes a parameter
through a step instead of 20.
All of it is narrow, norms too, as FSDP2's copies are on many ranks: the layout changes nothing.

Split masters (`optimizer.master_weights = "split"`). The model itself is bfloat16, each weight the high half of its
float32 master, and 16 low bits lie beside it (`kernels/adamw.py`): 2 bytes a parameter less, and the same numbers.

Gradients added in the product (`kernels.weight_gradients = "fused"`). Layers' linear maps add theirs in float32 to the
masters' themselves, microbatch by microbatch (`kernels/weight_gradient.py`); what else has a gradient, embedding, head,
norms and biases, is added here as ever, so that no gradient is counted twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron.engines.held import Held
from megatron.kernels.adamw import rounded_copy
from megatron.kernels.weight_gradient import HasGradient, MainGradient
from megatron.models.decoder import Decoder
from megatron.models.fp8_weights import Fp8Weights
from megatron.models.joined import add_gradients_in_products, join


class _Sum:
    """Where the gradient of a split master, which is no tensor of its own, is added up."""

    dtype = torch.float32

    def __init__(self) -> None:
        self.grad: Tensor | None = None


class MasterWeights:
    """`held`: the masters. `modules`: what runs forward and backward."""

    def __init__(
        self,
        master: Decoder,
        compute_dtype: torch.dtype,
        narrow_gradients: bool = False,
        split: bool = False,
        ties_away: bool = False,
    ) -> None:
        """master: its parameters have memory and are not set; bfloat16 ones where split. ties_away: the copy is
        rounded as split masters are, which is how an optimizer does that writes copies itself."""
        if _may_join(master):
            join(master)
        self._parameters: dict[str, nn.Parameter] = dict(master.named_parameters())
        self._wide: list[HasGradient] = []
        self._narrow: list[nn.Parameter] = []
        self._ties_away = ties_away
        self._copied: dict[str, tuple[Tensor, Tensor]] = {}
        lows: dict[str, Tensor] = {}
        model = master
        if split:
            lows = {name: torch.zeros_like(p, dtype=torch.int16) for name, p in self._parameters.items()}
            self._narrow = list(self._parameters.values())
            self._wide = [_Sum() for _ in self._narrow]
        elif any(p.dtype != compute_dtype for p in master.parameters()):
            model = self._copy(master, compute_dtype)
        self.modules: Sequence[nn.Module] = (model,)
        self._narrow_gradients = narrow_gradients and bool(self._narrow)
        computing = dict(model.named_parameters())
        sums: dict[str, HasGradient] = dict(computing if self._narrow_gradients else self._parameters)
        if split and not self._narrow_gradients:
            sums = dict(zip(self._parameters, self._wide, strict=True))
        self.held = [_hold(name, p, sums[name], lows.get(name)) for name, p in self._parameters.items()]
        self._fp8 = Fp8Weights(model)
        self._fused = self._add_in_products(model)

    def _copy(self, master: Decoder, dtype: torch.dtype) -> Decoder:
        with torch.device("meta"):
            copy = Decoder(master.shape, master.kernels, master.place, master.seed)
        copy.objective = master.objective
        names = []
        for prefix, module in copy.named_modules():
            for name in [name for name, _ in module.named_parameters(recurse=False)]:
                wide = self._parameters[f"{prefix}.{name}"]
                narrow = nn.Parameter(wide.detach().to(dtype))
                setattr(module, name, narrow)
                names.append(f"{prefix}.{name}")
                self._wide.append(wide)
                self._narrow.append(narrow)
        if _may_join(copy):
            join(copy)
        # Only now: joining lays them elsewhere.
        pairs = zip(names, self._narrow, strict=True)
        self._copied = {name: (self._parameters[name].detach(), narrow.detach()) for name, narrow in pairs}
        return copy

    def _add_in_products(self, model: Decoder) -> list[MainGradient]:
        if model.kernels.weight_gradients != "fused":
            return []
        if not self._narrow or self._narrow_gradients:
            raise ValueError("gradients are added in products where narrow weights have float32 sums beside them")
        return add_gradients_in_products(model.layers, dict(zip(self._narrow, self._wide, strict=True)))

    def before_backward(self, last: bool) -> None:
        """Makes the sums that products add to, before a step's first microbatch."""
        for main in self._fused:
            main.prepare()

    @torch.no_grad()
    def collect(self) -> None:
        """Adds the copy's gradients to the masters' and drops them, after each backward pass."""
        if self._narrow_gradients:
            return
        for main in self._fused:
            main.hand_out()
        for wide, narrow in zip(self._wide, self._narrow, strict=True):
            if narrow.grad is not None:
                _add(narrow, wide)

    def computing(self) -> Sequence[nn.Parameter]:
        """The narrow weights that compute, in order."""
        return self._narrow

    @torch.no_grad()
    def add(self, gradients: Sequence[Tensor], scale: float) -> None:
        """Adds scale x gradients, by narrow weight, to the masters'."""
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
        """What computes, by parameter name, where it is neither the masters themselves nor a half of them."""
        return {name: narrow for name, (_, narrow) in self._copied.items()}

    @torch.no_grad()
    def refresh(self, written: bool = False) -> None:
        """Casts the masters into the copy, after they have changed, unless the optimizer has written it; and what
        computes to 8 bits, where layers multiply in them."""
        if self._copied and not written:
            pairs = list(self._copied.values())
            if self._ties_away:
                for wide, narrow in pairs:
                    rounded_copy(wide, narrow)
            else:
                torch._foreach_copy_([narrow for _, narrow in pairs], [wide for wide, _ in pairs])
        self._fp8.refresh()

    def looked(self) -> None:
        """Nothing to do."""

    def drop_gradients(self) -> None:
        """Forgets all gradients."""
        for holder in (*self._parameters.values(), *self._narrow, *self._wide, *self._fused):
            holder.grad = None


def _may_join(model: Decoder) -> bool:
    return model.place.tensor.alone and not model.place.split_backward and not model.kernels.fp8


def _add(narrow: nn.Parameter, wide: HasGradient) -> None:
    assert narrow.grad is not None
    if wide.grad is None:
        wide.grad = narrow.grad.to(wide.dtype)
    else:
        wide.grad.add_(narrow.grad)
    narrow.grad = None


def _hold(name: str, parameter: nn.Parameter, sums: HasGradient, low: Tensor | None) -> Held:
    shape = tuple(parameter.shape)
    local = parameter.detach()

    def gradient() -> Tensor | None:
        return sums.grad

    return Held(name, local, shape, (0,) * len(shape), True, False, False, gradient, low)
