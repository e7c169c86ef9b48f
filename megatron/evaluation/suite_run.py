"""A suite over models: data found or named as missing, task files written once, each model asked, programs judged."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.config.errors import ConfigError, DataError
from megatron.evaluation.harness import (
    HarnessModel,
    HarnessSettings,
    fetch_rows,
    own_task_files,
    run_tasks,
    unavailable_tasks,
)
from megatron.evaluation.program_tasks import (
    ProgramSettings,
    ask_programs,
    judge_programs,
    program_result,
    sample_rows,
)
from megatron.evaluation.programs import Problem, problems_of
from megatron.evaluation.sandbox import require_sandbox
from megatron.evaluation.suite import Suite, SuiteTask
from megatron.evaluation.suite_data import TaskData, check_fetched, find_file, missing_words, read_data
from megatron.evaluation.suite_tasks import write_suite_task


@dataclass(frozen=True)
class ReadySuite:
    """A suite that can be run: where its task files lie, its problems, what it lacks. walls: of the sandbox, if any."""

    suite: Suite
    folder: Path
    data: dict[str, TaskData] = field(default_factory=dict)
    problems: dict[str, list[Problem]] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    walls: tuple[str, ...] = ()

    @property
    def harness_tasks(self) -> list[str]:
        """Names of the tasks that the harness runs."""
        return [task.name for task in self.present if task.kind != "program"]

    @property
    def present(self) -> list[SuiteTask]:
        """The tasks that have data."""
        return [task for task in self.suite.tasks if task.name not in self.missing]

    def described(self) -> dict[str, dict[str, Any]]:
        """What a results file says of each task, those that were not run among them."""
        about: dict[str, dict[str, Any]] = {}
        for task in self.suite.tasks:
            data = self.data.get(task.name)
            about[task.name] = {
                "source": task.source,
                "kind": task.kind,
                "chance": task.chance,
                "group": task.group,
                "metric": task.metric,
                "shots": task.shots,
                "chosen": task.chosen,
                "licence": task.licence,
                "data": data.origin if data else ("missing" if task.name in self.missing else "fetched by the harness"),
                "left_out": data.left_out if data else 0,
            }
        return about


def prepare_suite(
    suite: Suite,
    folder: Path,
    data: Path | None,
    online: bool,
    skip_missing: bool,
    execute: bool,
    limit: int | None = None,
) -> ReadySuite:
    """Finds and checks all data, and writes the task files into `folder`, before any model is loaded.

    execute: programs of the model may be run. Raises DataError that names every task without data and what to put
    where; ConfigError for a suite that must run programs and may not; UnavailableError where no walls can be had.
    """
    if data is not None and not data.is_dir():
        raise ConfigError(f"--data {data}: no such folder")
    walls = _walls(suite, execute)
    found: dict[str, TaskData] = {}
    missing: list[SuiteTask] = []
    reasons: list[str] = []
    for task in suite.tasks:
        path = find_file(task, data)
        if path is not None:
            found[task.name] = read_data(task, path)
        elif online and task.hub is not None:
            try:
                found[task.name] = _fetched(task)
            except DataError as error:
                missing.append(task)
                reasons.append(str(error))
        elif not (online and task.harness):
            missing.append(task)
    if not online:  # else what the harness cannot fetch is said together with the rest
        _check_missing(suite, missing, reasons, skip_missing, data)
    present = [task for task in suite.tasks if task not in missing]
    own = own_task_files({task.harness for task in present if task.kind == "harness"})
    problems: dict[str, list[Problem]] = {}
    for task in present:
        held = found.get(task.name)
        if task.kind == "program":
            assert held is not None
            problems[task.name] = problems_of(task, held.rows, held.origin)[:limit]
        else:
            write_suite_task(folder, task, held.rows if held else None, own.get(task.harness))
    fetched = [task.name for task in present if task.harness and task.name not in found]
    lost = unavailable_tasks(fetched, folder) if fetched else {}
    missing += [task for task in present if task.name in lost]
    _check_missing(suite, missing, [*reasons, *lost.values()], skip_missing, data)
    names = tuple(task.name for task in suite.tasks if task in missing)
    return ReadySuite(suite, folder, found, problems, names, tuple(walls))


def _check_missing(
    suite: Suite, missing: Sequence[SuiteTask], reasons: Sequence[str], skip_missing: bool, data: Path | None
) -> None:
    if missing and (not skip_missing or len(missing) == len(suite.tasks)):
        ordered = [task for task in suite.tasks if task in missing]
        raise DataError("\n".join([missing_words(suite.name, ordered, data), *reasons]))


def run_suite(
    ready: ReadySuite,
    model: HarnessModel,
    settings: HarnessSettings,
    programs: ProgramSettings,
    samples: Path | None = None,
    generate: Callable[..., list[str]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Results by task in the suite's order. samples: folder for every program of the model, a JSONL file a task.

    generate: in place of the model's own generation, for the code tasks. Raises DataError, before anything is asked,
    that names every code task with a prompt that is too long for the model.
    """
    if generate is None:
        check_room(ready, model)
    results: dict[str, dict[str, Any]] = {}
    if ready.harness_tasks:
        # the files include the harness' own, written by this project just now: they may name the harness' functions
        results |= run_tasks(model, ready.harness_tasks, ready.folder, settings)
    for task in ready.present:
        if task.kind != "program":
            continue
        problems = ready.problems[task.name]
        answers = ask_programs(problems, generate or model.generate, _new_tokens(task), programs)
        outcomes = judge_programs(problems, answers, programs) if ready.walls else None
        results[task.name] = program_result(problems, answers, outcomes, programs)
        if samples is not None:
            rows = sample_rows(problems, answers, outcomes)
            samples.mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (samples / f"{task.name}.jsonl").write_text(lines, encoding="utf-8")
    ordered = {task.name: results[task.name] for task in ready.present}
    for task in ready.present:
        ordered[task.name]["metric"] = task.metric
    return ordered


def check_room(ready: ReadySuite, model: HarnessModel) -> None:
    """Raises DataError that names every code task whose longest prompt leaves no room for an answer, and a way out."""
    reasons: list[str] = []
    crowded: list[str] = []
    room = model.positions
    for task in ready.present:
        if task.kind != "program":
            continue
        try:
            length, prompt = model.longest_prompt([problem.prompt for problem in ready.problems[task.name]])
        except DataError as error:
            raise DataError(f"task {task.name}: {error}") from None
        if length + _new_tokens(task) > model.positions:
            crowded.append(task.name)
            room = min(room, model.positions - length)
            reasons.append(
                f"task {task.name}: a prompt of {length} tokens and {_new_tokens(task)} new ones do not fit into the "
                f"model's {model.positions} positions. It begins: {prompt[:60]!r}"
            )
    if not crowded:
        return
    ways = [f"lower --max-new-tokens to at most {room}"] if room > 0 else []
    if others := [task.name for task in ready.present if task.name not in crowded]:
        ways.append(f"leave {' and '.join(crowded)} out: --tasks {','.join(others)}")
    ways.append("take a model with more positions")
    raise DataError("\n".join([f"{model.folder}: nothing was run", *reasons, f"Remedy: {'; or '.join(ways)}"]))


def _new_tokens(task: SuiteTask) -> int:
    return task.max_new_tokens or 256


def suite_words(suite: Suite, data: Path | None) -> list[str]:
    """The suite for people: its tasks, what counts, their data, whether these are there."""
    lines = [f"{suite.name}: {suite.title}"]
    for task in suite.tasks:
        path = find_file(task, data)
        where = str(path) if path else f"{(data or Path('DIR')) / task.data_file}" + (" (not there)" if data else "")
        lines.append(f"  {task.name:<14} {task.group:<22} {task.metric}, {task.shots} shots; chosen: {task.chosen}")
        lines.append(f"      data: {task.source}; licence: {task.licence}")
        lines.append(f"      local file: {where}" + ("; or --online" if task.harness or task.hub else ""))
    return lines


def _walls(suite: Suite, execute: bool) -> Sequence[str]:
    running = [task.name for task in suite.tasks if task.runs_programs]
    if running and not execute:
        others = dict.fromkeys(task.group for task in suite.tasks if not task.runs_programs)
        rest = f", or leave them out: --tasks '{','.join(others)}'" if others else ""
        raise ConfigError(
            f"{', '.join(running)} of suite {suite.name} run programs that the model writes. Say "
            f"--allow-code-execution to run them, each behind the walls that docs/evaluation.md describes{rest}"
        )
    return require_sandbox() if execute and any(task.kind == "program" for task in suite.tasks) else ()


def _fetched(task: SuiteTask) -> TaskData:
    assert task.hub is not None
    rows: list[Mapping[str, Any]] = []
    for split in task.hub.split.split("+"):
        rows += fetch_rows(task.hub.path, task.hub.name, split, task.hub.columns)
    return check_fetched(task, [dict(row) for row in rows], f"{task.hub.path} ({task.hub.split})")
