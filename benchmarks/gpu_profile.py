"""`gpu.py --profile CASE`: what a training step spends its time on, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable

from gpu_job import Context
from torch.profiler import ProfilerActivity, profile

_LINES = 40


def profiled(context: Context, name: str, call: Callable[[], object]) -> None:
    """Prints the table of the costliest operations of a call, and writes it beside the results."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * context.cuda
    with profile(activities=kinds) as found:
        call()
    order = "self_cuda_time_total" if context.cuda else "self_cpu_time_total"
    table = found.key_averages().table(sort_by=order, row_limit=5 if context.dry else _LINES, max_name_column_width=80)
    kind = "-profile.txt"
    path = context.results.path.with_name(context.results.path.stem + kind)
    path.write_text(f"one step of {name}, by {order}\n{table}\n", encoding="utf-8")
    print(f"the costliest operations of a step of {name} are in {path}:")
    print("\n".join(table.splitlines()[: 6 if context.dry else _LINES]), flush=True)
