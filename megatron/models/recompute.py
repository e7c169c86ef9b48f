"""Activation recompute: less is kept for the backward pass, and made again there, bit for bit.

full: each layer keeps its input alone. selective keeps most and forgets what is large and cheap: by policy "attention"
all between the projections (Korthikanti et al., arXiv 2205.05198, section 5), context exchanges included; by policy
"operations" everything but the outputs of matrix products with weights and of torch's fused attention.

A module's call is replaced, no module is put around it, so that parameters keep their global names. There is no random
state to restore: dropout's masks are functions of what they drop (`kernels/dropout.py`). Collectives inside a
recomputed part run again, in the same order on all ranks, since all run the same layers of the same microbatch.

What a schedule that runs input and weight gradients apart (zero-bubble) does to torch's checkpoint, at torch 2.13: it
recomputes anew for every graph task, and there is one for the inputs and one for each group of parameters: a layer of
Llama was computed ten times over. `_Once` below computes it once and keeps what it made until the graph is gone.
torch's selective policies let a region be recomputed only once ("Trying to backward an extra time"), so that policy
"operations" is refused there. Policy "attention" holds no weight: the weights' backward passes never enter it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megatron.config.errors import ConfigError
from megatron.models.decoder import Decoder, DecoderLayer

_aten = torch.ops.aten
KEPT_OPERATIONS = frozenset(
    (
        _aten.mm.default,
        _aten.addmm.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        _aten._flash_attention_forward.default,
        _aten._cudnn_attention_forward.default,
    )
)
"""Products with weights, and fused attention: dear to compute, and no larger than a layer's input. Batched products,
which `attention_blockwise` makes of scores, are not among them.
"""


def apply_recompute(model: Decoder, how: str, policy: str = "attention", layers: int | None = None) -> None:
    """Makes the first `layers` layers that this rank holds (None: all) recompute in their backward pass.

    how: "none", "selective" or "full"; policy, for selective: "attention" or "operations". Once a model. Raises
    ConfigError for what a split backward pass cannot do, ValueError for unknown words.
    """
    if how == "none":
        return
    if how not in ("selective", "full") or policy not in ("attention", "operations"):
        raise ValueError(f"recompute {how!r} by policy {policy!r} is unknown")
    split = model.place.split_backward
    if split and (how, policy) == ("selective", "operations"):
        raise ConfigError(
            "parallel.recompute_policy = operations does not go with schedules that split the backward pass "
            "(zero-bubble, zbv): torch's policies let a layer be recomputed only once; set recompute_policy to "
            "attention, recompute to full, or schedule to 1f1b"
        )
    for layer in list(model.layers.values())[:layers]:
        assert isinstance(layer, DecoderLayer)
        if how == "full":
            layer.forward = partial(_once if split else _forgotten, layer.forward)  # type: ignore[method-assign]
        elif policy == "operations":
            layer.forward = partial(_products_kept, layer.forward)  # type: ignore[method-assign]
        else:
            layer.attention.core = partial(_forgotten, layer.attention.core)


def _forgotten(call: Callable[..., Tensor], *args: Any, **named: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return call(*args, **named)
    return checkpoint(call, *args, use_reentrant=False, preserve_rng_state=False, **named)  # type: ignore[no-any-return]


def _products_kept(call: Callable[..., Tensor], *args: Any, **named: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return call(*args, **named)
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(  # type: ignore[no-any-return]
        call, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **named
    )


def _policy(_context: Any, operation: Any, *_args: Any, **_named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT_OPERATIONS else CheckpointPolicy.PREFER_RECOMPUTE


def _once(call: Callable[..., Tensor], *args: Any, **named: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return call(*args, **named)
    made_again = _Once(partial(call, *args, **named))
    with saved_tensors_hooks(made_again.forget, made_again.give):
        return made_again.call()


class _Place:
    """Stands in the graph for a tensor that is not kept; dies with the graph's node."""

    __slots__ = ("__weakref__",)


class _Enough(Exception):
    """All tensors that the graph needs have been made."""


class _Once:
    """What one call would have saved: forgotten, then made again at the first need, whatever backward pass asks."""

    def __init__(self, call: Callable[[], Tensor]) -> None:
        self.call = call
        self._places: list[weakref.ref[_Place]] = []
        self._kinds: list[tuple[object, ...]] = []
        self._made: weakref.WeakKeyDictionary[_Place, Tensor] = weakref.WeakKeyDictionary()

    def forget(self, tensor: Tensor) -> _Place:
        place = _Place()
        self._places.append(weakref.ref(place))
        self._kinds.append(_kind(tensor))
        return place

    def give(self, place: _Place) -> Tensor:
        if place not in self._made:
            self._make()
        return self._made[place]

    def _make(self) -> None:
        """Runs the call again; its n-th saved tensor is the n-th place's."""
        number = 0

        def take(tensor: Tensor) -> Tensor:
            nonlocal number
            if number == len(self._places) or _kind(tensor) != self._kinds[number]:
                raise RuntimeError(
                    f"recompute saved tensor {number} as {_kind(tensor)}, the forward pass as "
                    f"{self._kinds[number] if number < len(self._kinds) else 'none'}: the layer is not deterministic"
                )
            tensor = tensor.detach()
            place = self._places[number]()
            if place is not None:
                self._made[place] = tensor
            number += 1
            if number == len(self._places):
                raise _Enough
            return tensor

        try:
            with torch.enable_grad(), saved_tensors_hooks(take, lambda tensor: tensor):
                self.call()
        except _Enough:
            return
        raise RuntimeError(f"recompute saved {number} tensors, the forward pass {len(self._places)}")


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.device
