"""The hardware section of a plan's page: memory of a rank, the step, the run, disk, and the search's layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from megatron.metrics.report_page import Cell, table

_KINDS = (
    ("parameters", "master weights"),
    ("gradients", "gradients"),
    ("optimizer", "optimizer state"),
    ("gathered", "weights to compute with"),
    ("accumulated", "gradients to be reduced"),
    ("receive", "pipeline's buffers"),
    ("activations", "activations"),
    ("logits", "loss"),
    ("workspace", "short-lived tensors"),
    ("framework", "CUDA context and NCCL"),
)
_SPENT = (
    ("products", "matrix products"),
    ("attention", "attention"),
    ("memory_bound", "elementwise operations"),
    ("recompute", "made again"),
    ("bubble", "pipeline's bubble"),
    ("communication", "communication waited for"),
    ("optimizer", "update"),
    ("launch", "host behind the device"),
)


def hardware_html(part: Mapping[str, Any]) -> str:
    """The section's content, of "hardware" in a plan."""
    device = part["accelerator"]
    nodes = f"{part['nodes']} node{'s' if part['nodes'] > 1 else ''}"
    pieces = [f'<p class="note">{part["processes"]:,} x {escape(device["name"])}, {nodes}.</p>']
    pieces += [f'<p class="note">Train refuses this layout: {escape(words)}</p>' for words in part["refusals"]]
    if part["layout"] is not None:
        pieces.append(_layout("The config's layout", part["layout"], part))
    if part["nearest"] is not None:
        changes = ", ".join(part["nearest"]["changes"])
        pieces.append(_layout(f"The nearest layout that fits: {changes}", part["nearest"], part))
    if part["search"] is not None:
        pieces.append(_search(part["search"]))
    pieces.append(_disk(part["disk"]))
    pieces.append(
        '<p class="note">Exact: bytes of weights, gradients, optimizer state, messages and checkpoints, and what '
        "forward passes keep. A model: short-lived tensors, CUDA's and NCCL's own memory, and all times. Efficiency: "
        f"{escape(part['efficiency'])}. Device: {escape(device['sources'])}.</p>"
    )
    return "".join(pieces)


def _layout(title: str, row: Mapping[str, Any], part: Mapping[str, Any]) -> str:
    rows = row["micro_batch_size"]
    words = f"{row['words']}, microbatches of {rows} row{'s' if rows > 1 else ''}"
    room = f"{_gb(row['needed_bytes'])} GB of {_gb(part['capacity_bytes'])}"
    verdict = f"fits: {room}" if row["fits"] else f"does not fit: {room}, {_gb(row['missing_bytes'])} too much"
    step, run = row["step"], row["run"]
    figures = [
        (_seconds(step["total"]), "a step"),
        (f"{step['tokens_per_second']:,.0f}", "tokens a second"),
        (f"{step['mfu_causal']:.1%} / {step['mfu_full']:.1%}", "MFU, 6N + 6LdT / 6N + 12LdT"),
        (f"{run['hours']:,.1f}", "hours"),
        (f"{run['gpu_hours']:,.0f}", "GPU-hours"),
    ]
    cells = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in figures)
    fullest = row["memory"]["ranks"][row["memory"]["fullest"]]
    spent = [
        [("left", name), ("", _seconds(step[kind])), ("", f"{step[kind] / step['total']:.1%}")]
        for kind, name in _SPENT
        if step[kind] > 0
    ]
    return (
        f"<h3>{escape(title)}</h3><p>{escape(words)}; <b>{escape(verdict)}</b></p>{_set(row)}"
        f'<div class="figures">{cells}</div>'
        + _table(["memory of the fullest rank", "GB", "share"], _memory(fullest))
        + _table(["a step", "time", "share"], spent)
        + _table(["sent in a step", "GB in its node", "GB to other nodes", "waited for"], _sent(row))
        + _table(["training stage", "steps", "hours", "GPU-hours"], _stages(run))
        + "".join(f'<p class="note">{escape(words)}</p>' for words in row["notes"])
    )


def _memory(rank: Mapping[str, Any]) -> list[list[Cell]]:
    rows: list[list[Cell]] = [
        [("left", name), ("", _gb(rank[kind])), ("", f"{rank[kind] / rank['total']:.1%}")]
        for kind, name in _KINDS
        if rank[kind]
    ]
    return [*rows, [("left better", "in all"), ("better", _gb(rank["total"])), ("", "")]]


def _sent(row: Mapping[str, Any]) -> list[list[Cell]]:
    return [
        [
            ("left", axis["axis"]),
            ("", _gb(axis["inside_node"])),
            ("", _gb(axis["between_nodes"])),
            ("", _seconds(axis["exposed_seconds"])),
        ]
        for axis in row["communication"]
    ]


def _stages(run: Mapping[str, Any]) -> list[list[Cell]]:
    return [
        [
            ("left", stage["name"]),
            ("", f"{stage['steps']:,}"),
            ("", f"{stage['hours']:,.2f}"),
            ("", f"{stage['gpu_hours']:,.0f}"),
        ]
        for stage in run["stages"]
    ]


def _set(row: Mapping[str, Any]) -> str:
    words = " ".join(f"--set {word}" for word in row["set"])
    return f"<p><code>{escape(words)}</code></p>" if words else ""


def _search(found: Mapping[str, Any]) -> str:
    rows = found["best"] or found["misses"]
    title = "The fastest layouts that fit" if found["best"] else "Nothing fits; the layouts that need least"
    cells: list[list[Cell]] = [
        [
            ("left", f"{row['words']}, {row['micro_batch_size']} rows"),
            ("left", _recompute(row)),
            ("", _gb(row["needed_bytes"])),
            ("", _seconds(row["step_seconds"])),
            ("", f"{row['mfu_full']:.1%}"),
            ("", f"{row['bubble']:.1%}"),
            ("left", " ".join(f"--set {word}" for word in row["set"])),
        ]
        for row in rows
    ]
    fewest = found["fewest_processes"]
    more = f" The fewest processes over which a layout fits: {fewest:,}." if fewest else ""
    note = f"{found['looked_at']:,} layouts looked at, {found['refused']:,} of which train refuses.{more}"
    heads = ["layout", "recompute", "GB", "step", "MFU", "bubble", "what sets it"]
    return f'<h3>{title}</h3>{_table(heads, cells)}<p class="note">{note}</p>'


def _recompute(row: Mapping[str, Any]) -> str:
    if row["recompute"] == "none":
        return "none"
    layers = f", {row['recompute_layers']} layers of each stage" if row["recompute_layers"] else ""
    policy = f" ({row['recompute_policy']})" if row["recompute_policy"] else ""
    return f"{row['recompute']}{policy}{layers}"


def _disk(disk: Mapping[str, Any]) -> str:
    lines = (
        ("a checkpoint", f"{_gb(disk['checkpoint_bytes'])} GB"),
        ("the run's folder at most", f"{_gb(disk['output_bytes'])} GB, {disk['checkpoints_at_most']} checkpoints"),
        ("a save", f"{_seconds(disk['save_seconds'])} at {_gb(disk['bandwidth'])} GB/s"),
        ("an export in bf16", f"{_gb(disk['export_bytes'])} GB"),
        ("indexed data", f"{_gb(disk['data_bytes'])} GB"),
        ("epoch indexes", f"{_gb(disk['index_bytes'])} GB"),
    )
    return _table(["disk", ""], [[("left", name), ("left", words)] for name, words in lines])


def _table(heads: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    return table(list(heads), [list(row) for row in rows], 1) if rows else ""


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f}" if size < 1e12 else f"{size / 1e9:,.0f}"


def _seconds(value: float) -> str:
    return f"{value:,.2f} s" if value >= 1 else f"{value * 1000:,.3g} ms" if value else "0"
