"""What of [results] and [report] will be refused or means nothing, told by a plan, before anything is trained."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from megatron.config.errors import ConfigError
from megatron.config.evaluation_section import HELDOUT
from megatron.evaluation.suite import SuiteTask, read_suite
from megatron.study.arms import arms_of
from megatron.study.node_results import LOSS, WIN_RATE
from megatron.study.results_section import HARNESS, SuiteSection
from megatron.study.steps import ResolvedArm, trained
from megatron.study.study_file import Study, nearest

_ANY = "*"
"""In place of a task or a group: of a suite whose tasks are not known here."""
_SHOWN = 12

Asked = list[tuple[str, str, str]]


def unknown_names(study: Study, arms: Mapping[str, ResolvedArm]) -> list[dict[str, Any]]:
    """Warnings of a plan: what of [results] `study run` will refuse, and names of [report] that nothing is called by.
    Data that a suite is without are no matter of a plan."""
    groups = {name: source.group for arm in arms.values() for name, source in trained(arm.end)[-1].run.sources.items()}
    asked, found = _asked(study, groups)
    found += _without_held_out(study, arms)
    found += _missing_prompts(study)
    rows: list[dict[str, Any]] = [
        {"gravity": "high", "kind": "study-run-refuses", "exit_code": 2, "text": f"study run will refuse: {words}"}
        for words in found
    ]
    if not found:  # what a mistyped suite has is not known
        known = list(dict.fromkeys(f"{suite}/{task}" for suite, task, _ in asked if task != _ANY))
        for key, pattern in _patterns(study):
            if not _matches(pattern, asked):
                text = f"{study.place('report')}: {key}: {pattern!r} matches nothing that [results] asks about"
                text += f": {nearest(pattern.removesuffix('/loss'), known[:_SHOWN], 'it asks about')}"
                rows.append({"gravity": "medium", "kind": "unknown-figure", "text": text})
    texts = [*unknown_labels(study), *_shared_labels(study), *_unknown_axes(study, asked, groups)]
    return rows + [{"gravity": "medium", "kind": "unknown-figure", "text": text} for text in texts]


def _asked(study: Study, groups: Mapping[str, str]) -> tuple[Asked, list[str]]:
    """(suite, task, group) of all that is asked about, and what is wrong with it."""
    results, asked, wrong = study.words.results, Asked(), list[str]()
    place = study.place("results")
    if results.loss_of is not None:
        names = results.loss_of.sources or list(groups)
        asked += [(LOSS, name, groups[name]) for name in names if name in groups]
        wrong += [
            f"{place}: results.loss.sources: {name!r} is no source of the study: {nearest(name, groups)}"
            for name in names
            if name not in groups
        ]
    for suite in results.suites:
        try:
            asked += [(suite.name, task, group) for task, group in _tasks(study, suite, groups)]
        except ConfigError as error:
            wrong.append(f"{place}: results.suites: {suite.name}: {error}")
    if results.win_rate is not None:
        asked.append((WIN_RATE, _ANY, "win rate"))
    return asked, wrong


def _tasks(study: Study, suite: SuiteSection, groups: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Names and groups of a suite's tasks. Raises ConfigError for a suite or a task that there is none of."""
    if suite.of == HARNESS:
        yield _ANY, _ANY
    elif suite.of == HELDOUT:
        for name in suite.sources or groups:
            if name not in groups:
                raise ConfigError(f"sources: {name!r} is no source of the study: {nearest(name, groups)}")
            title = "heldout_" + re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")
            yield from ((title, groups[name]), (f"{title}_loss", groups[name]))
    else:
        file = str(study.path.parent / suite.of) if suite.of.endswith(".toml") else suite.of
        tasks = read_suite(file).select(suite.tasks).tasks
        check_programs(tasks, suite)
        yield from ((task.name, task.group) for task in tasks)


def check_programs(tasks: Sequence[SuiteTask], suite: SuiteSection) -> None:
    """Raises ConfigError where tasks run programs that a model writes, and the suite does not say that they may."""
    running = [task.name for task in tasks if task.runs_programs]
    if running and not suite.allow_code_execution:
        raise ConfigError(
            f"{', '.join(running)} run programs that the model writes: say allow_code_execution = true to run them, "
            "each behind the walls that docs/evaluation.md describes, or leave them out of tasks"
        )


def _without_held_out(study: Study, arms: Mapping[str, ResolvedArm]) -> Iterator[str]:
    results = study.words.results
    if not all(trained(arm.end)[-1].config.validation.fraction == 0 for arm in arms.values()):
        return
    asking = [f"suites: {suite.name}" for suite in results.suites if suite.of == HELDOUT]
    if results.loss_of is not None and "loss" in results.model_fields_set:
        asking.append("loss")
    for what in asking:
        yield f"{study.place('results')}: results.{what} is about held-out documents, and validation.fraction is 0"


def _missing_prompts(study: Study) -> Iterator[str]:
    results = study.words.results
    for table, asked in (("samples", results.samples), ("win_rate", results.win_rate)):
        if asked is not None and isinstance(asked.prompts, str) and not (study.path.parent / asked.prompts).is_file():
            yield f"{study.place('results')}: results.{table}.prompts = {asked.prompts!r}: no such file"


def unknown_labels(study: Study) -> Iterator[str]:
    """What is wrong with each label of [report] whose arm there is not."""
    labels, arms = study.words.report.labels, arms_of(study)
    for name in labels:
        if name not in arms:
            place = study.place("report", "labels")
            yield f"{place}: report.labels names {name!r}, which is no arm: {nearest(name, arms)}"


def _shared_labels(study: Study) -> Iterator[str]:
    labels = study.words.report.labels
    shown = [labels.get(name, name) for name in arms_of(study)]
    for label in dict.fromkeys(one for one in shown if shown.count(one) > 1):
        yield f"{study.place('report')}: report.labels: {shown.count(label)} arms are called {label!r}"


def _unknown_axes(study: Study, asked: Asked, groups: Mapping[str, str]) -> Iterator[str]:
    """Of plots: the group whose share is plotted, the two scores of the plane."""
    report, known = study.words.report, [*dict.fromkeys([*groups.values(), *groups])]
    if "share" in report.model_fields_set and report.share not in known:
        yield f"{study.place('report')}: report.share = {report.share!r} is no group or source: " + nearest(
            report.share, known
        )
    scores = dict.fromkeys(group for _, _, group in asked)
    if not report.scores and _ANY not in scores:
        for name in report.pareto:
            if name not in scores:
                yield f"{study.place('report')}: report.pareto names {name!r}, which is no score: " + nearest(
                    name, scores, "scores are"
                )


def _patterns(study: Study) -> Iterator[tuple[str, str]]:
    report = study.words.report
    yield from (("report.metrics", pattern) for pattern in report.metrics)
    for score, patterns in report.scores.items():
        yield from ((f"report.scores.{score}", pattern) for pattern in patterns)


def _matches(pattern: str, asked: Asked) -> bool:
    """As reports match them, but for the metric, which the evaluation knows."""
    whole = pattern.count("/") >= 2
    name = pattern.rpartition("/")[0] if whole else pattern
    for suite, task, group in asked:
        names = [f"{suite}/{task}"] if whole else [f"{suite}/{task}", task, group]
        # either may have letters that stand for any
        if any(fnmatchcase(one, name) or fnmatchcase(name, one) for one in names if one):
            return True
    return False
