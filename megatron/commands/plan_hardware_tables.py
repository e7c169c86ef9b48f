"""The hardware part of a plan on the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from megatron.commands.tables import new_table
from megatron.config.quantities import format_count

WIDTH = 80
_KINDS = {
    "parameters": "master weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "gathered": "weights to compute with",
    "accumulated": "gradients to be reduced",
    "receive": "pipeline's buffers",
    "activations": "activations",
    "logits": "loss",
    "workspace": "short-lived tensors",
    "framework": "CUDA context and NCCL",
}
_SPENT = {
    "products": "matrix products",
    "attention": "attention",
    "memory_bound": "elementwise operations",
    "recompute": "made again",
    "bubble": "pipeline's bubble",
    "communication": "communication waited for",
    "optimizer": "update",
    "launch": "host behind the device",
}
_LEGEND = (
    "c2: context 2. x4: interleaved, 4 stages a rank; zb: zero-bubble. opt, grad, full: data_shard; /2: 2 replicas. "
    "attn, ops, full: what is recomputed, in so many layers of each stage. rows: of a microbatch. GB: of the fullest "
    "rank. MFU by 6N + 12LdT."
)
_MOMENTS = {
    "loss": "at the loss",
    "backward": "in the backward pass",
    "gradients": "when all gradients are there",
    "update": "in the update",
}


def show_hardware(part: dict[str, Any], console: Console) -> None:
    """Prints "hardware" of a plan."""
    console.print()
    console.print(_headline(part), style="bold", soft_wrap=True)
    for words in part["refusals"]:
        _show_words(console, f"train refuses this layout: {words}", "  ")
    now, near, found = part["layout"], part["nearest"], part["search"]
    if now is not None:
        _show_words(console, _with_rows(now), "  ")
        console.print(f"  {_in_short(now)}\n", style="bold" if now["fits"] else "bold red", soft_wrap=True)
        _show_memory(now, part, console)
        _show_step(now, console)
        _show_communication(now, console)
        _show_run(now["run"], console)
        _show_notes(now["notes"], console)
    if near is not None:
        _show_nearest(near, console)
        if found is None:
            console.print("  --search shows the fastest layouts, which may change more\n")
    if found is not None:
        _show_search(found, now, console)
    _show_disk(part["disk"], console)
    _show_honesty(part, console)


def _headline(part: dict[str, Any]) -> str:
    device = part["accelerator"]
    if part["nodes"] == 1:
        where = "one node"
    elif part["partial_node"]:
        where = (
            f"{part['nodes'] - 1} whole node{'s' if part['nodes'] > 2 else ''} and {part['partial_node']} of another"
        )
    else:
        where = f"{part['nodes']} nodes"
    precision = "bf16" if part["precision"] == "auto" else part["precision"]
    return f"On {part['processes']:,} x {device['name']} ({where}), {precision}"


def _with_rows(row: dict[str, Any]) -> str:
    rows = row["micro_batch_size"]
    return f"{row['words']}, microbatches of {rows} row{'s' if rows > 1 else ''}"


def _in_short(row: dict[str, Any]) -> str:
    gigabytes = f"{_gb(row['needed_bytes'])} GB of {_gb(row['memory']['capacity_bytes'])}"
    if not row["fits"]:
        return f"does not fit: {gigabytes}, {_gb(row['missing_bytes'])} too much"
    step, run = row["step"], row["run"]
    return (
        f"fits: {gigabytes}; {_seconds(step['total'])} a step; {_number(run['hours'])} hours, "
        f"{_number(run['gpu_hours'])} GPU-hours"
    )


def _show_memory(row: dict[str, Any], part: dict[str, Any], console: Console) -> None:
    memory = row["memory"]
    ranks, fullest = memory["ranks"], memory["ranks"][memory["fullest"]]
    which = f" of pipeline rank {memory['fullest']}" if len(ranks) > 1 else ""
    console.print(f"Memory{which}, {_MOMENTS[fullest['moment']]}, GB", style="bold")
    for kind, words in _KINDS.items():
        if fullest[kind]:
            console.print(f"  {words:<26}{_gb(fullest[kind]):>10}")
    console.print(f"  {'in all':<26}{_gb(fullest['total']):>10}   {_verdict(row, part)}\n", style="bold")
    if len(ranks) == 1:
        return
    table = new_table(
        "Memory of each pipeline rank, GB", "rank", "state", "gathered", "receive", "activations", "other", "in all"
    )
    for rank, row_ in _collapsed(ranks):
        state = sum(row_[kind] for kind in ("parameters", "gradients", "optimizer"))
        gathered = row_["gathered"] + row_["accumulated"]
        other = row_["logits"] + row_["workspace"] + row_["framework"]
        cells = (state, gathered, row_["receive"], row_["activations"], other, row_["total"])
        table.add_row(rank, *(_gb(size) for size in cells))
    console.print(table)


def _collapsed(ranks: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Neighbours that hold the same as one line; of very many the first and the last."""
    lines: list[tuple[int, int, dict[str, Any]]] = []
    for row in ranks:
        alike = {key: value for key, value in row.items() if key != "pipeline_rank"}
        number = row["pipeline_rank"]
        if lines and lines[-1][2] == alike:
            lines[-1] = (lines[-1][0], number, alike)
        else:
            lines.append((number, number, alike))
    shown = lines if len(lines) <= 16 else [*lines[:8], *lines[-8:]]
    return [(str(first) if first == last else f"{first}-{last}", row) for first, last, row in shown]


def _verdict(row: dict[str, Any], part: dict[str, Any]) -> str:
    room = f"of {_gb(part['capacity_bytes'])} ({_gb(part['accelerator']['memory_bytes'])} less "
    room += f"{part['memory_margin']:.0%})"
    if row["fits"]:
        return f"fits, {room}"
    return f"{_gb(row['missing_bytes'])} too much, {room}"


def _show_step(row: dict[str, Any], console: Console) -> None:
    step = row["step"]
    console.print(f"A step of {_seconds(step['total'])}", style="bold")
    for kind, words in _SPENT.items():
        if step[kind] > 0:
            console.print(f"  {words:<26}{_seconds(step[kind]):>10}  {step[kind] / step['total']:>6.1%}")
    if step["hidden"]:
        console.print(f"  {'communication hidden':<26}{_seconds(step['hidden']):>10}   beside computation")
    rate, each = format_count(round(step["tokens_per_second"])), step["tokens_per_second_per_process"]
    console.print(f"  {rate} tokens/s, {each:,.0f} a GPU; {row['microbatches']} microbatches a data rank")
    console.print(f"  MFU {step['mfu_causal']:.1%} by 6N + 6LdT a token, {step['mfu_full']:.1%} by 6N + 12LdT\n")


def _show_communication(row: dict[str, Any], console: Console) -> None:
    if not row["communication"]:
        return
    table = new_table(
        "Sent by a rank in a step, GB", "of", "inside its node", "to other nodes", "messages", "waited for"
    )
    for axis in row["communication"]:
        table.add_row(
            {"everyone": "all ranks"}.get(axis["axis"], axis["axis"]),
            _gb(axis["inside_node"]),
            _gb(axis["between_nodes"]),
            f"{axis['messages']:,}",
            _seconds(axis["exposed_seconds"]),
        )
    console.print(table)


def _show_run(run: dict[str, Any], console: Console) -> None:
    table = new_table("The whole run", "stage", "steps", "hours", "GPU-hours", "saving", "validating")
    for stage in run["stages"]:
        table.add_row(
            stage["name"],
            f"{stage['steps']:,}",
            _number(stage["hours"]),
            _number(stage["gpu_hours"]),
            _hours(stage["saving_hours"]),
            _hours(stage["validating_hours"]),
        )
    console.print(table)
    console.print(
        f"  in all {_number(run['hours'])} hours ({run['hours'] / 24:,.1f} days), "
        f"{_number(run['gpu_hours'])} GPU-hours, without starts and failures\n"
    )


def _show_notes(notes: Sequence[str], console: Console) -> None:
    for words in notes:
        _show_words(console, words, "  note: ")
    if notes:
        console.print()


def _show_nearest(row: dict[str, Any], console: Console) -> None:
    count = len(row["changes"])
    changes = f"{count} change{'s' if count > 1 else ''}: {', '.join(row['changes'])}"
    console.print(f"The nearest layout that fits ({changes})", style="bold", soft_wrap=True)
    _show_words(console, _with_rows(row), "  ")
    _show_words(console, _in_short(row), "  ")
    _show_settings(row, console, "  ")
    console.print()
    _show_notes(row["notes"], console)


def _show_search(found: dict[str, Any], now: dict[str, Any] | None, console: Console) -> None:
    rows = found["best"] or found["misses"]
    looked = f"{found['looked_at']:,} layouts looked at, {found['refused']:,} of which train refuses"
    if found["too_large"]:
        looked += f" and {found['too_large']:,} do not fit with their weights and optimizer state alone"
    if not rows:
        console.print(f"No layout over {found['processes']:,} processes ({looked})", style="bold", soft_wrap=True)
        _show_fewest(found, console)
        return
    title = "The fastest layouts that fit" if found["best"] else "Nothing fits; the layouts that need least"
    table = new_table(title, "", "tensor", "pipeline", "data", "recompute", "rows", "GB", "step", "MFU", "bubble")
    table.padding = (0, 0)
    for number, row in enumerate(rows, 1):
        table.add_row(
            str(number),
            _tensor(row),
            _pipeline(row),
            _data(row),
            _recompute(row),
            str(row["micro_batch_size"]),
            f"{row['needed_bytes'] / 1e9:,.1f}",
            _seconds(row["step_seconds"]),
            f"{row['mfu_full']:.1%}",
            f"{row['bubble']:.0%}" if row["bubble"] else "",
        )
    console.print(table)
    _show_words(console, f"{looked}. {_LEGEND}", "  ")
    console.print()
    for number, row in enumerate(rows, 1):
        _show_settings(row, console, f"  {number:>2}  ")
    if not found["best"]:
        _show_fewest(found, console)
        return
    run, step = found["fastest"]["run"], found["fastest"]["step"]
    console.print()
    ahead = f", {now['step']['total'] / step['total']:.2f} times as fast as the config's" if now and now["fits"] else ""
    console.print(f"  the first of them: {_number(run['hours'])} hours, {_number(run['gpu_hours'])} GPU-hours{ahead}\n")


def _tensor(row: dict[str, Any]) -> str:
    axes = row["axes"]
    return f"{axes['tensor']}" + (f" c{axes['context']}" if axes["context"] > 1 else "")


def _pipeline(row: dict[str, Any]) -> str:
    if row["schedule"] is None:
        return "1"
    short = {"interleaved": f"x{row['virtual']}", "zero-bubble": "zb", "zbv": "zbv", "1f1b": ""}
    return f"{row['axes']['pipeline']} {short[row['schedule']]}".rstrip()


def _data(row: dict[str, Any]) -> str:
    axes = row["axes"]
    data = axes["replicate"] * axes["shard"]
    if data == 1:
        return "1"
    replicas = f"/{axes['replicate']}" if axes["shard"] > 1 and axes["replicate"] > 1 else ""
    short = {"none": "", "optimizer": "opt", "gradients": "grad", "full": "full"}[row["data_shard"]]
    return f"{data} {short}{replicas}".rstrip()


def _recompute(row: dict[str, Any]) -> str:
    if row["recompute"] == "none":
        return ""
    word = row["recompute_policy"] or "full"
    short = {"attention": "attn", "operations": "ops", "full": "full"}[word]
    return f"{short} {row['recompute_layers']}" if row["recompute_layers"] else short


def _show_fewest(found: dict[str, Any], console: Console) -> None:
    if found["fewest_processes"] is None:
        console.print("  nor was one found over up to 64 times as many: a smaller model or sequence would do\n")
        return
    rest = "" if found["fewest_is_exact"] else " (not all numbers below were tried)"
    console.print(f"  the fewest processes over which a layout fits: {found['fewest_processes']:,}{rest}\n")


def _show_settings(row: dict[str, Any], console: Console, begin: str) -> None:
    """The --set words, as a shell takes them, in lines that are not wrapped."""
    words = [f"--set {one}" for one in row["set"]] or ["(as the config says)"]
    lines, line = [], begin
    for word in words:
        if line.strip() and len(line) + len(word) > WIDTH - 2 and line != begin:
            lines.append(line.rstrip() + " \\")
            line = " " * len(begin)
        line += f"{word} "
    lines.append(line.rstrip())
    for one in lines:
        console.print(one, soft_wrap=True)
    for key in row["leave_out"]:
        console.print(f"{' ' * len(begin)}and take {key} out of the file", soft_wrap=True)


def _show_disk(disk: dict[str, Any], console: Console) -> None:
    console.print("Disk", style="bold")
    one = f"{_gb(disk['checkpoint_bytes'])} GB: weights {_gb(disk['model_bytes'])}, optimizer "
    one += _gb(disk["optimizer_bytes"])
    most, last = disk["checkpoints_at_most"], disk["checkpoints_at_the_end"]
    beside = ", beside training" if disk["asynchronous"] else ""
    lines = {
        "a checkpoint": one,
        "the run's folder": f"{_gb(disk['output_bytes'])} GB at most, with {most} checkpoints; {last} stay",
        "a save": f"{_seconds(disk['save_seconds'])} at {_gb(disk['bandwidth'])} GB/s in all{beside}",
        "an export in bf16": f"{_gb(disk['export_bytes'])} GB",
        "indexed data": f"{_gb(disk['data_bytes'])} GB, and {_size(disk['index_bytes'])} of epoch indexes",
    }
    for name, words in lines.items():
        console.print(f"  {name:<20}{words}")
    console.print()


def _show_honesty(part: dict[str, Any], console: Console) -> None:
    _show_words(
        console,
        "Exact: bytes of weights, gradients, optimizer state, messages and checkpoints, and what forward passes keep. "
        "A model: short-lived tensors, CUDA's and NCCL's own memory, and all times; docs/planner.md has their errors "
        f"beside published and measured steps. Efficiency: {part['efficiency']}. Device: "
        f"{part['accelerator']['sources']}.",
        "  ",
    )


def _show_words(console: Console, words: str, begin: str) -> None:
    for line in textwrap.wrap(words, WIDTH, initial_indent=begin, subsequent_indent="  ", break_long_words=False):
        console.print(line, soft_wrap=True)


def _gb(size: float) -> str:
    gigabytes = size / 1e9
    if 0 < gigabytes < 0.005:
        return "<0.01"
    return f"{gigabytes:,.2f}" if gigabytes < 1000 else f"{gigabytes:,.0f}"


def _size(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size:,} bytes"


def _seconds(value: float) -> str:
    if value == 0:
        return "0"
    if value < 1:
        return f"{value * 1000:,.3g} ms" if value >= 1e-5 else "<0.01 ms"
    return f"{value:,.3f} s" if value < 10 else f"{value:,.1f} s"


def _number(value: float) -> str:
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def _hours(value: float) -> str:
    return "" if value == 0 else f"{_number(value)} h" if value >= 0.01 else f"{value * 60:.2g} min"
