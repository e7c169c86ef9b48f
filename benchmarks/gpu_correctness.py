"""Part b: every kernel against float64, on random inputs that no run has seen before, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from gpu_job import Context, Job, first_line
from gpu_operations import (
    Inputs,
    Maker,
    NotHere,
    Operation,
    Sizes,
    Way,
    all_operations,
    copied,
    mapped,
    tensors_of,
    words_of_sizes,
)  # fmt: skip
from gpu_results import Row
from torch import Tensor

TITLE = "every kernel against float64"
NOTES = (
    "error: `|result - reference| / |reference|` in 2-norms; worst: the largest `|difference| / (|reference| + rms of "
    "the reference)` of an element; both of the result or gradient where they are largest. The reference is the "
    "definition of the same inputs in float64. A way fails above the tolerance and above 1.5 times the "
    "definition's own error at its dtype, with worst at ten times that; and where a Triton kernel's second call gives "
    "other bits than the first. Outputs are allocated where NaN lay before. What torch.compile makes is timed in part "
    "c and not checked here."
)

WORST = 10.0
"""How much further off an element may be than all of them together."""

Errors = dict[str, tuple[float, float, torch.dtype]]
"""By result: error, worst, and the result's dtype."""

_SLACK = 1.5

Results = dict[str, Tensor]


def jobs(context: Context) -> Iterator[Job]:
    """All operations at one size and dtype, then all at the next, so that a part cut short has seen each."""
    cases = []
    for operation in all_operations().values():
        sizes = operation.dry if context.dry else operation.checked
        rounds = [(number, dtype, at) for dtype in operation.dtypes for number, at in enumerate(sizes)]
        cases += [(turn, operation, dtype, at) for turn, (_, dtype, at) in enumerate(rounds)]
    for _, operation, dtype, at in sorted(cases, key=lambda case: case[0]):
        name = f"{operation.name}, {_short(dtype)}, {words_of_sizes(at)}"
        yield Job(name, partial(_check, context, operation, dtype, at))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check(context: Context, operation: Operation, dtype: torch.dtype, sizes: Sizes) -> Sequence[Row]:
    """A row for every way but compiled formulas. The interpreter truncates where a GPU rounds: a dry run may be off by
    twice as much."""
    generator = torch.Generator(context.device).manual_seed(context.seed)
    inputs = operation.inputs(sizes, Maker(context.device, dtype, generator))
    reference, upstream = _reference(operation, inputs, generator)
    if context.dry:
        operation = replace(operation, tolerances={kind: 2 * least for kind, least in operation.tolerances.items()})
    own: Errors = dict.fromkeys(reference, (0.0, 0.0, torch.float64))
    try:
        own = _errors(_results(operation, operation.ways["eager"], copied(inputs), upstream, reference), reference)
        rows = [_row(operation, dtype, sizes, "eager", own, own)]
    except Exception as error:  # the kernels are then held to the tolerances alone
        rows = [_begin(operation, dtype, sizes, "eager") | {"failed": first_line(error)}]
    for name, way in operation.ways.items():
        if name not in ("eager", "compile"):
            rows.append(_row_of(operation, dtype, sizes, name, way, inputs, upstream, reference, own))
    return rows


def _row_of(
    operation: Operation,
    dtype: torch.dtype,
    sizes: Sizes,
    name: str,
    way: Way,
    inputs: Inputs,
    upstream: Sequence[Tensor],
    reference: Results,
    own: Errors,
) -> Row:
    begin = _begin(operation, dtype, sizes, name)
    try:
        found = _results(operation, way, copied(inputs), upstream, reference)
        again = _results(operation, way, copied(inputs), upstream, reference) if name == "triton" else found
    except NotHere as reason:
        return begin | {"not here": str(reason)}
    except Exception as error:  # a kernel that cannot be launched is a row, and the others are checked
        return begin | {"failed": first_line(error)}
    row = _row(operation, dtype, sizes, name, _errors(found, reference), own)
    if any(not torch.equal(found[key], again[key]) for key in found):
        row["failed"] = f"{row.get('failed', '')} a second call gave other bits".strip()
    return row


def _begin(operation: Operation, dtype: torch.dtype, sizes: Sizes, way: str) -> Row:
    return {"operation": operation.name, "dtype": _short(dtype), "sizes": words_of_sizes(sizes), "way": way}


def _reference(operation: Operation, inputs: Inputs, generator: torch.Generator) -> tuple[Results, tuple[Tensor, ...]]:
    """float64 results and gradients, and the gradients of results that all ways are given."""
    held = copied(inputs)
    if operation.reference is None:
        held = mapped(held, lambda x: _widened(x))
        call = operation.ways["eager"](held)
    else:
        call = operation.reference(held)
    outputs = tensors_of(call())
    leaves = _leaves(inputs)
    dtype = next(iter(leaves.values())).dtype if leaves else torch.float32
    upstream = tuple(
        torch.randn(out.shape, device=out.device, generator=generator).to(dtype) for out in outputs if out.requires_grad
    )
    return _named(outputs, _leaves(held), [up.double() for up in upstream]), upstream


def _widened(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x


def _leaves(inputs: Inputs) -> Results:
    return {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad}


def _named(outputs: Sequence[Tensor], leaves: Results, upstream: Sequence[Tensor]) -> Results:
    found = {f"result {number}": out.detach() for number, out in enumerate(outputs)}
    differentiable = [out for out in outputs if out.requires_grad]
    if differentiable and leaves:
        gradients = torch.autograd.grad(differentiable, list(leaves.values()), list(upstream))
        found |= {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return found


def _results(operation: Operation, way: Way, inputs: Inputs, upstream: Sequence[Tensor], reference: Results) -> Results:
    """A way's results and gradients."""
    call = way(inputs)
    _poison(reference, _leaves(inputs))
    outputs = tensors_of(operation.settled(call()))
    given = iter(upstream)
    matched = [next(given).to(out.dtype) for out in outputs if out.requires_grad]
    # What is overwritten later (a gradient's buffer, an input) is looked at as it is now.
    return {name: x.clone() for name, x in _named(outputs, _leaves(inputs), matched).items()}


def _poison(reference: Results, leaves: Results) -> None:
    """Leaves NaN where the allocator will find room for the results: what is not written is then no number."""
    dtypes = {x.dtype for x in leaves.values()} or {torch.float32}
    blocks = [torch.full(x.shape, torch.nan, dtype=d, device=x.device) for x in reference.values() for d in dtypes]
    del blocks


def _errors(found: Results, reference: Results) -> Errors:
    """(error, worst, dtype) by result; infinite where one is no number."""
    errors = {}
    for name, truth in reference.items():
        truth, given = truth.double(), found[name].double()
        size = truth.square().mean().sqrt() if truth.numel() else truth.new_zeros(())
        off = (given - truth).abs()
        error = float(off.square().mean().sqrt() / size) if float(size) else float(off.sum())
        worst = float((off / (truth.abs() + size)).max()) if float(size) else float(off.sum())
        bad = not bool(given.isfinite().all())
        errors[name] = (float("inf") if bad else error, float("inf") if bad else worst, found[name].dtype)
    return errors


def _row(
    operation: Operation,
    dtype: torch.dtype,
    sizes: Sizes,
    way: str,
    errors: Errors,
    own: Errors,
) -> Row:
    """The result that is furthest beyond what it may be off decides."""

    def excess(name: str) -> float:
        error, worst, kind = errors[name]
        allowed = max(operation.tolerances[kind], _SLACK * own[name][0])
        return max(error / allowed, worst / max(WORST * allowed, _SLACK * own[name][1]))

    furthest = max(errors, key=excess)
    error, worst, kind = errors[furthest]
    row = _begin(operation, dtype, sizes, way)
    row |= {"error": error, "worst": worst, "where": furthest, "eager's error": own[furthest][0]}
    row["tolerance"] = operation.tolerances[kind]
    if way == "eager":
        bad = error == float("inf")
    else:
        bad = not excess(furthest) <= 1.0
    return row | ({"failed": f"{excess(furthest):.1f} times what it may be off"} if bad else {})
