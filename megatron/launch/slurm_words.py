"""Words that sbatch reads: times, arrays, dependencies, directives; refused here before a queue refuses them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from megatron.config.errors import ConfigError

_TIME = re.compile(r"(?:(\d+)-(\d+)(?::(\d+))?(?::(\d+))?|(\d+)(?::(\d+))?(?::(\d+))?)")
_UNLIMITED = ("UNLIMITED", "INFINITE")
_ARRAY_PART = re.compile(r"(\d+)(?:-(\d+)(?::(\d+))?)?")
_DEPENDENCY = re.compile(
    r"(singleton|(after|afterany|afterok|afternotok|aftercorr|afterburstbuffer)(:\d+(_\d+)?(\+\d+)?)+)"
)
MOST_TASKS = 100_000
"""Of an array; SLURM's own limit (MaxArraySize) is 1001 unless a site raises it."""


def parse_time(words: str) -> int | None:
    """Seconds of a time limit as `man sbatch` writes it; None for UNLIMITED.

    "minutes", "minutes:seconds", "hours:minutes:seconds", "days-hours", "days-hours:minutes",
    "days-hours:minutes:seconds". Raises ConfigError.
    """
    if words.strip().upper() in _UNLIMITED:
        return None
    found = _TIME.fullmatch(words.strip())
    if found is None:
        raise ConfigError(
            f"--time {words}: no time that sbatch reads: write minutes (90), hours:minutes:seconds (12:00:00) or "
            "days-hours:minutes:seconds (2-12:00:00)"
        )
    days, hours, day_minutes, day_seconds, first, second, third = (
        int(part) if part else None for part in found.groups()
    )
    if days is not None:
        total = ((days * 24 + (hours or 0)) * 60 + (day_minutes or 0)) * 60 + (day_seconds or 0)
    elif third is not None:
        total = ((first or 0) * 60 + (second or 0)) * 60 + third
    else:
        total = (first or 0) * 60 + (second or 0)
    if not total:
        raise ConfigError(f"--time {words}: no time at all: give at least a minute")
    return total


def time_words(seconds: float) -> str:
    """For people: "2 days 12 h", "90 s", "24 min"."""
    left = round(seconds)
    parts = []
    for name, size in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {'day' if name == 'days' and count == 1 else name}")
    return " ".join(parts) or "0 s"


@dataclass(frozen=True)
class ArraySpec:
    """The tasks of a job array. ids: ascending. limit: how many run at a time at most; None: all."""

    ids: tuple[int, ...]
    limit: int | None = None

    @property
    def words(self) -> str:
        """As sbatch takes it, shortest: "0-31%4", "1,3,7"."""
        runs: list[list[int]] = []
        for number in self.ids:
            if runs and number == runs[-1][1] + 1:
                runs[-1][1] = number
            else:
                runs.append([number, number])
        spans = (str(first) if first == last else f"{first}-{last}" for first, last in runs)
        return ",".join(spans) + (f"%{self.limit}" if self.limit else "")

    @property
    def contiguous(self) -> bool:
        """Whether no number is missing between the first and the last."""
        return self.ids[-1] - self.ids[0] + 1 == len(self.ids)


def parse_array(words: str) -> ArraySpec:
    """The array of "0-31", "1,3,7", "0-15:4", each with "%4" behind it where only 4 shall run at a time.

    Raises ConfigError.
    """
    spec, percent, limit_words = words.strip().partition("%")
    if percent and (not limit_words.isdecimal() or int(limit_words) < 1):
        raise ConfigError(f"--array {words}: after % stands how many tasks run at a time, a number from 1 on")
    ids: set[int] = set()
    for part in spec.split(","):
        found = _ARRAY_PART.fullmatch(part.strip())
        if found is None:
            raise ConfigError(
                f"--array {words}: {part.strip()!r} is no task or span: write 0-31, 1,3,7, 0-15:4 or 0-31%4"
            )
        first, last, step = int(found[1]), int(found[2] or found[1]), int(found[3] or 1)
        if last < first:
            raise ConfigError(f"--array {words}: {part.strip()} runs backwards: write {last}-{first}")
        if step < 1:
            raise ConfigError(f"--array {words}: {part.strip()}: a step is at least 1")
        if last - first >= MOST_TASKS:
            raise ConfigError(f"--array {words}: more than {MOST_TASKS} tasks: split it over several launches")
        ids.update(range(first, last + 1, step))
    return ArraySpec(tuple(sorted(ids)), int(limit_words) if percent else None)


def check_dependency(words: str) -> str:
    """The same words. Raises ConfigError for what sbatch does not know."""
    for part in re.split(r"[,?]", words.strip()):
        if not _DEPENDENCY.fullmatch(part):
            raise ConfigError(
                f"--dependency {words}: {part!r} is none that sbatch knows: write afterany:JOB, afterok:JOB:JOB, "
                "after:JOB or singleton, several with commas"
            )
    return words.strip()


def directive(name: str, value: str | int | None = None) -> str:
    """One line "#SBATCH --name=value", quoted where sbatch would read it otherwise. Raises ConfigError."""
    if value is None:
        return f"#SBATCH --{name}"
    words = str(value)
    if bad := re.search(r"[\x00-\x1f\x7f\\]", words):
        raise ConfigError(f"--{name} {words!r}: holds {bad.group()!r}, which no #SBATCH line can: leave it out")
    return f"#SBATCH --{name}={shlex.quote(words)}"


def log_pattern(path: str) -> str:
    """A path for sbatch's --output, in which % begins a pattern."""
    return path.replace("%", "%%")


def with_values(words: str, values: Mapping[str, str]) -> str:
    """The words quoted for bash, with each name in braces, "{task}", replaced by a bash word that is expanded there.

    values: bash words by name, such as {"task": '"$SLURM_ARRAY_TASK_ID"'}; other braces stay as they are.
    """
    if not values:
        return shlex.quote(words)
    parts = re.split("(" + "|".join(re.escape(f"{{{name}}}") for name in values) + ")", words)
    known = {f"{{{name}}}": value for name, value in values.items()}
    return "".join(known.get(part) or shlex.quote(part) for part in parts if part) or "''"


TASK = {"task": '"$SLURM_ARRAY_TASK_ID"'}
"""For `with_values`: the number of an array's task."""
