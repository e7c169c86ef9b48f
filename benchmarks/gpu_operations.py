"""What an operation is to `gpu.py`: one entry with its inputs by size, the ways to compute it, and what it must move.

A way takes the inputs and gives a call without arguments; whatever it prepares before (a plan of documents, an
optimizer) is not timed. Doors are named, not imported, so that an entry may name a kernel that is not there yet.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Sizes = Mapping[str, int]
Inputs = dict[str, Any]
Call = Callable[[], Any]
Way = Callable[[Inputs], Call]


class NotHere(Exception):
    """A way that this device or this tree does not have: said in its row, and no failure."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that must cross the memory bus at least, each read once and each written once, and operations of matrix
    products: of the forward and of the backward pass."""

    forward: float
    backward: float = 0.0
    forward_flops: float = 0.0
    backward_flops: float = 0.0

    def limits(self, copy: float, gemm: float) -> tuple[float, float]:
        """Seconds that either pass takes at least, at so many bytes and operations a second."""
        return max(self.forward / copy, self.forward_flops / gemm), max(
            self.backward / copy, self.backward_flops / gemm
        )


TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
"""Of |result - reference| / |reference|, 2-norms, by dtype of the result; one rounding to nearest is 1.1e-3 in bfloat16
and the interpreter's truncation twice that."""


@dataclass(frozen=True)
class Operation:
    """One operation.

    inputs: by name, in the order of the doors' arguments; those that require a gradient are differentiated by. ways: by
    name; "eager" is the definition. reference: the way to a float64 result, given inputs in their own dtypes; default
    the definition of inputs in float64. settled: what is compared of a way's result, where that is not all of it.
    traffic: of sizes and bytes an element. checked, timed, dry: sizes. dtypes: of inputs that are checked; the first is
    timed.
    """

    name: str
    inputs: Callable[[Sizes, Maker], Inputs]
    ways: Mapping[str, Way]
    traffic: Callable[[Sizes, int], Traffic]
    checked: tuple[Sizes, ...]
    timed: tuple[Sizes, ...]
    dry: tuple[Sizes, ...]
    reference: Way | None = None
    settled: Callable[[Any], Any] = lambda result: result
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    tolerances: Mapping[torch.dtype, float] = field(default_factory=lambda: TOLERANCES)

    def truth(self, inputs: Inputs) -> Call:
        """The call that gives the float64 result."""
        return self.reference(inputs) if self.reference else self.ways["eager"](widened(inputs))


@dataclass(frozen=True)
class Maker:
    """Makes random inputs of one dtype on a device, from one generator."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    def normal(
        self, *shape: int, scale: float = 1.0, shift: float = 0.0, grad: bool = True, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Normal numbers; a leaf that requires a gradient."""
        made = torch.randn(*shape, device=self.device, generator=self.generator)
        made = made.mul_(scale).add_(shift).to(dtype or self.dtype)
        return made.requires_grad_() if grad else made

    def integers(self, high: int, *shape: int) -> Tensor:
        """int64 in [0, high)."""
        return torch.randint(high, shape, device=self.device, generator=self.generator)


def door(module: str, name: str, **named: Any) -> Way:
    """megatron.kernels.MODULE's NAME, called with the inputs in their order."""

    def way(inputs: Inputs) -> Call:
        function = imported(module, name)
        return lambda: function(*inputs.values(), **named)

    return way


def compiled(formula: Callable[..., Any]) -> Way:
    """A plain formula under torch.compile, for these very shapes."""

    def way(inputs: Inputs) -> Call:
        function = torch.compile(formula, dynamic=False)
        return lambda: function(*inputs.values())

    return way


def imported(module: str, name: str) -> Callable[..., Any]:
    """megatron.kernels.MODULE's NAME. Raises NotHere."""
    path = f"megatron.kernels.{module}"
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(path), name)
    except ModuleNotFoundError as error:
        if error.name != path:
            raise
        raise NotHere(f"{path} is not in this tree") from None
    except AttributeError:
        raise NotHere(f"{path} has no {name}") from None
    return found


def all_operations() -> dict[str, Operation]:
    """By name, in the order in which they are checked and timed."""
    from gpu_operations_attention import ATTENTION
    from gpu_operations_fp8 import FP8
    from gpu_operations_layers import LAYERS
    from gpu_operations_state import STATE
    from gpu_operations_words import WORDS

    return {operation.name: operation for operation in (*LAYERS, *WORDS, *ATTENTION, *STATE, *FP8)}


def words_of_sizes(sizes: Sizes) -> str:
    """ "rows 16384, size 4096"."""
    return ", ".join(f"{name} {number}" for name, number in sizes.items())


def mapped(thing: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same with every tensor changed, through mappings, sequences and dataclasses."""
    if isinstance(thing, Tensor):
        return change(thing)
    if isinstance(thing, dict):
        return {key: mapped(value, change) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        changed = [mapped(value, change) for value in thing]
        return type(thing)(*changed) if hasattr(thing, "_fields") else type(thing)(changed)
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        fields = {f.name: mapped(getattr(thing, f.name), change) for f in dataclasses.fields(thing) if f.init}
        return dataclasses.replace(thing, **fields)
    return thing


def copied(inputs: Inputs) -> Inputs:
    """New leaves with the same values and strides."""
    return mapped(
        inputs, lambda x: x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.requires_grad)
    )


def widened(inputs: Inputs) -> Inputs:
    """New leaves in float64, of what is floating."""

    def wide(x: Tensor) -> Tensor:
        return x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x.clone()

    return mapped(inputs, wide)


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    found: list[Tensor] = []
    mapped(result, found.append)
    return found
