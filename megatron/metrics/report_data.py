"""What a report shows, as plain data: rows of metrics.jsonl gathered into series over tokens.

Everything here is read from files and nothing computed by a model. Missing parts are None or empty; the page says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.config.errors import DataError

Point = tuple[float, float]


@dataclass(frozen=True)
class Band:
    """A training stage along the token axis, [start, end]."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class ReportData:
    """A run, ready to be shown.

    steps, validations: rows of metrics.jsonl. planned: stages of `stagemix plan --json`, or of a ledger where there is
    no plan, each with "name", "start_token", "tokens", "samples" and "weights". ledger: rows of the ledger's table.
    evaluations: contents of evaluate's files. in_loop: results in OUTPUT/evaluations, by step. facts: what ran, label
    by label. config: the resolved TOML.
    """

    name: str
    steps: Sequence[Mapping[str, Any]]
    validations: Sequence[Mapping[str, Any]]
    planned: Sequence[Mapping[str, Any]]
    ledger: Sequence[Mapping[str, Any]]
    groups: Mapping[str, str]
    evaluations: Sequence[Mapping[str, Any]] = ()
    in_loop: Sequence[Mapping[str, Any]] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    config: str = ""
    parameters: int | None = None
    notes: Sequence[str] = ()

    @property
    def sources(self) -> list[str]:
        """Names of all sources, those of one group together."""
        return sorted(self.groups, key=lambda name: (self.groups[name], name))

    @property
    def tokens(self) -> float:
        """Input positions that the run has trained on."""
        return float(self.steps[-1]["consumed_tokens"]) if self.steps else 0.0

    def bands(self) -> list[Band]:
        """The training stages as far as the run has come, from its own steps."""
        bands: list[Band] = []
        last = 0.0
        for row in self.steps:
            end = float(row["consumed_tokens"])
            if bands and bands[-1].name == row["training_stage"]:
                bands[-1] = Band(bands[-1].name, bands[-1].start, end)
            else:
                bands.append(Band(str(row["training_stage"]), last, end))
            last = end
        return bands

    def planned_bands(self) -> list[Band]:
        """The training stages as planned, to the plan's end."""
        starts = [(str(stage["name"]), float(stage["start_token"]), float(stage["tokens"])) for stage in self.planned]
        return [Band(name, start, start + tokens) for name, start, tokens in starts]


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Step rows and validation rows of metrics.jsonl, each step once (a resume may have written one again).

    Raises DataError for a missing file or a line that is no JSON object; an unfinished last line is passed over.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file, so there is nothing to report: is --run the run's output?") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error}") from None
    steps: dict[int, dict[str, Any]] = {}
    validations: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "evaluation" not in row:  # those stand in OUTPUT/evaluations with all that belongs to them
                (validations if "validation" in row else steps)[int(row["step"])] = row
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break  # a run that is being written, or was killed while it wrote
            raise DataError(f"{path}, line {number}: not a metrics row: {error!r}") from None
    return [steps[step] for step in sorted(steps)], [validations[step] for step in sorted(validations)]


def over_steps(steps: Iterable[Mapping[str, Any]], say: Callable[[Mapping[str, str]], str]) -> str:
    """What `say` makes of the record of each start, with the steps that it holds for: "steps 1–400: a; 401–439: b".

    Steps are left out where it never changed. Empty where no start is on record.
    """
    stretches: list[tuple[int, int, str]] = []
    words = ""
    for row in steps:
        if isinstance(start := row.get("start"), Mapping):
            words = say(start)
        begin = stretches.pop()[0] if stretches and stretches[-1][2] == words else row["step"]
        stretches.append((begin, row["step"], words))
    if len(stretches) < 2:
        return words
    ranges = [f"{first}–{last}" if first < last else str(first) for first, last, _ in stretches]
    said = [f"{where}: {what or 'not recorded'}" for where, (_, _, what) in zip(ranges, stretches, strict=True)]
    return "steps " + "; ".join(said)


def layout_words(start: Mapping[str, str]) -> str:
    """What [parallel] was at a start: "8 processes: tensor 2 x data 4, data shard full, torch"."""
    chosen = {key: start.get(key, "none") for key in ("pipeline", "data shard", "context", "recompute")}
    others = [f"{key} {value}" for key, value in chosen.items() if value != "none"]
    return ", ".join([start.get("layout", "one process"), *others, start.get("engine", "engine not recorded")])


def series(rows: Iterable[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], Any]) -> list[Point]:
    """(consumed tokens, value) of the rows that have a finite one."""
    points = []
    for row in rows:
        y = value(row)
        if isinstance(y, int | float) and math.isfinite(y):
            points.append((float(row["consumed_tokens"]), float(y)))
    return points


def binned(points: Sequence[Point], bins: int) -> list[Point]:
    """At most `bins` points, each the mean of its neighbours; what is short enough already stays as it is."""
    if len(points) <= bins:
        return list(points)
    means = []
    for number in range(bins):
        part = points[len(points) * number // bins : len(points) * (number + 1) // bins]
        means.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return means


def realised_shares(data: ReportData, bins: int = 90) -> list[tuple[float, float, dict[str, float]]]:
    """(start, end, share of samples by source) of stretches of tokens, none of which crosses a stage's bound."""
    stretches: list[tuple[float, float, dict[str, float]]] = []
    total = max(1, len(data.steps))
    start = 0.0
    part: list[Mapping[str, Any]] = []
    for index, row in enumerate(data.steps):
        part.append(row)
        following = data.steps[index + 1] if index + 1 < len(data.steps) else None
        full = len(part) >= max(1, total // bins)
        if following is None or following["training_stage"] != row["training_stage"] or full:
            counts = {name: sum(step["samples_by_source"].get(name, 0) for step in part) for name in data.sources}
            together = max(1, sum(counts.values()))
            end = float(row["consumed_tokens"])
            stretches.append((start, end, {name: count / together for name, count in counts.items()}))
            start, part = end, []
    return stretches


def planned_shares(data: ReportData, points_a_stage: int = 24) -> list[tuple[float, dict[str, float]]]:
    """(tokens, weight by source) along the plan, two entries at each jump; constant stretches have their ends only."""
    shares: list[tuple[float, dict[str, float]]] = []
    for stage in data.planned:
        samples, weights = int(stage["samples"]), stage["weights"]
        if samples == 0:
            continue
        length = float(stage["tokens"]) / samples
        start = float(stage["start_token"])
        for place in _places(weights, samples, points_a_stage):
            shares.append((start + place * length, _weights_at(weights, place, data.sources)))
    return shares


def _places(weights: Mapping[str, Any], samples: int, points: int) -> list[float]:
    """Sample numbers worth a point: both sides of every segment's start, and along ramps."""
    places = {0.0, float(samples)}
    for segment in weights["segments"]:
        if 0 < segment["start"] < samples:
            places |= {segment["start"] - 1e-6, float(segment["start"])}
        if "to" in segment:
            end = min(samples, segment["end"])
            places |= {segment["start"] + (end - segment["start"]) * n / points for n in range(points + 1)}
    return sorted(place for place in places if 0 <= place <= samples)


def _weights_at(weights: Mapping[str, Any], place: float, sources: Sequence[str]) -> dict[str, float]:
    segment = [part for part in weights["segments"] if part["start"] <= place or part is weights["segments"][0]][-1]
    share = 0.0
    if "to" in segment and segment["end"] > segment["start"]:
        share = min(1.0, max(0.0, (place - segment["start"]) / (segment["end"] - segment["start"])))
    first, last = segment["weights"], segment.get("to", segment["weights"])
    mixed = {name: (1 - share) * first.get(name, 0) + share * last.get(name, 0) for name in sources}
    total = sum(mixed.values()) or 1.0
    return {name: value / total for name, value in mixed.items()}
