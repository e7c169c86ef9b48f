"""What [results] asks of every node, checked before anything runs, and turned into parts (node_parts.py)."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron.config.errors import ConfigError, DataError
from megatron.config.evaluation_section import HELDOUT
from megatron.config.schema import RunConfig
from megatron.data.sources import OpenSource
from megatron.evaluation.suite import Suite, read_suite
from megatron.evaluation.suite_data import find_file, missing_words
from megatron.study.asked_names import check_programs
from megatron.study.held_out_questions import unaskable_sources, without_held_out
from megatron.study.node_parts import ANSWERS, EXPORT, SAMPLES, WIN_RATE, Part, content_of, key_of
from megatron.study.node_results import LOSS
from megatron.study.plan import PlannedStudy
from megatron.study.results_section import HARNESS, SamplesSection, SuiteSection, WinRateSection
from megatron.study.steps import trained
from megatron.study.study_file import nearest

HELD_OUT_CONFIG = "held-out.toml"
"""In a node's folder: the config whose sources' held-out documents are asked about."""
_VERSIONS = {"export": 1, LOSS: 1, "suite": 1, "generate": 1, "judge": 1}
"""To be raised where the same weights and words would come to other figures."""


class Questions:
    """What a study asks. Raises ConfigError or DataError for what cannot be asked of any node."""

    def __init__(self, planned: PlannedStudy) -> None:
        self.planned = planned
        self.section = planned.study.words.results
        self.folder = planned.study.path.parent
        self.sources = _sources_of(planned)
        self.groups = {name: source.group for name, source in self.sources.items()}
        self._fractions = sorted({step.config.validation.fraction for step in _steps_of(planned)})
        self.notes: list[str] = []
        self._loss = self._losses()
        self._suites = [self._suite(suite) for suite in self.section.suites]
        self._samples = self._prompts(self.section.samples, "samples")
        self._duels = self._prompts(self.section.win_rate, "win_rate")
        self._check_win_rate()

    def parts(self, name: str, weights: str) -> tuple[Part, ...]:
        """What is to be done of a node whose weights have this fingerprint, in order."""
        section, called = self.section, self.called(name)
        export = key_of(version=_VERSIONS["export"], weights=weights, dtype=section.export_dtype)
        parts = [Part(EXPORT, "export", export, EXPORT, ("--overwrite", f"--dtype={section.export_dtype}"))]
        beside: dict[str, Any] = {"dtype": section.dtype, "device": section.device}
        if self._loss is not None:
            settings = {**self._loss, **beside, "batch_size": section.batch_size, "groups": self.groups}
            key = key_of(version=_VERSIONS[LOSS], weights=weights, asked=self._loss, groups=self.groups, **beside)
            parts.append(Part(LOSS, "loss", key, f"evaluation-{LOSS}.json", (), settings))
        for suite, content in zip(section.suites, self._suites, strict=True):
            aside = {"jobs", "data", "include_path", "suite", *(() if suite.sources else ("sources",))}
            asked = suite.model_dump(mode="json", exclude=aside)
            key = key_of(version=_VERSIONS["suite"], export=export, asked=asked, content=content, **beside)
            file = f"evaluation-{suite.name}.json"
            parts.append(Part(suite.name, "suite", key, file, self._suite_words(suite, called)))
        for kind, prompts, asked_of in (
            (SAMPLES, self._samples, section.samples),
            (ANSWERS, self._duels, section.win_rate),
        ):
            if asked_of is not None:
                words, facts = _generate_words(asked_of, section.dtype), {"prompts": prompts, "device": section.device}
                key = key_of(version=_VERSIONS["generate"], weights=weights, words=words, **facts)
                parts.append(Part(kind, "generate", key, f"{kind}.jsonl", words, {"prompts": prompts}))
        return tuple(parts)

    def judging(self, own: Part, other: Part, names: tuple[str, str], files: tuple[Path, Path]) -> Part:
        """The duel of a node's answers with the baseline's. names, files: of both."""
        asked = self.section.win_rate
        assert asked is not None
        words = [f"--answers={name}={file}" for name, file in zip(names, files, strict=True)]
        words += [f"--seed={asked.seed}", f"--judge-seconds={asked.judge_seconds}"]
        if asked.judge is not None:
            words.append(f"--judge={asked.judge}")
            judge: Any = [
                (word, content_of(Path(word)) if Path(word).is_file() else "") for word in self._judge(asked.judge)
            ]
        else:
            assert asked.judge_model is not None
            folder = self.folder / asked.judge_model
            words += [f"--judge-model={folder}", f"--device={self.section.device}", f"--dtype={self.section.dtype}"]
            judge = [(str(one), one.stat().st_size, one.stat().st_mtime) for one in sorted(folder.glob("*"))]
        key = key_of(version=_VERSIONS["judge"], answers=[own.key, other.key], judge=judge, seed=asked.seed)
        return Part(WIN_RATE, "judge", key, f"{WIN_RATE}.json", tuple(words))

    def called(self, name: str) -> str:
        """What a node is called in results files; "=" ends a name on command lines."""
        return self.planned.graph.nodes[name].label.replace("=", "-")

    def held_out_config(self, name: str) -> RunConfig:
        """The config of a node's run with the sources of all arms, and no more held out than every arm holds out."""
        config = trained(self.planned.graph.nodes[name].step)[-1].config
        validation = config.validation.model_copy(update={"fraction": self._fractions[0]})
        shared = {"allow_overlap": True}  # of each that shares documents, train has been told already
        sources = {title: source.section.model_copy(update=shared) for title, source in self.sources.items()}
        return config.model_copy(update={"sources": sources, "validation": validation})

    # What is asked, checked

    def _losses(self) -> dict[str, Any] | None:
        asked = self.section.loss_of
        if asked is None:
            return None
        with_data = {title: source for title, source in self.sources.items() if source.order is not None}
        if "loss" not in self.section.model_fields_set and not (self._fractions[0] and with_data):
            self.notes.append("losses by source are not measured: no documents are held out (validation.fraction)")
            return None
        for title in asked.sources:
            if title not in self.sources:
                raise ConfigError(
                    f"{self._place()}: results.loss.sources: {title!r} is no source of the study: "
                    f"{nearest(title, self.sources)}"
                )
            if title not in with_data:
                raise ConfigError(
                    f"{self._place()}: results.loss.sources: {title!r} is planned by its size, without data"
                )
        self._check_held_out("loss", "loss = false")
        chosen = asked.sources or sorted(with_data)
        if not self._hold_out(chosen):
            return None
        contents = {title: _identity(with_data[title]) for title in chosen}
        lengths = {step.config.model.seq_length for step in _steps_of(self.planned)}
        tokenizers = {str(step.run.ledger.tokenizer) for step in _steps_of(self.planned)}
        return {
            "tokens": asked.tokens,
            "sources": list(chosen),
            "contents": contents,
            "fraction": str(self._fractions[0]),
            "seq_length": min(lengths),
            "tokenizers": sorted(tokenizers),
        }

    def _hold_out(self, chosen: Sequence[str]) -> bool:
        """Whether some of the sources that losses are asked of hold documents out; a note names those that do not."""
        empty = without_held_out({title: self.sources[title] for title in chosen})
        if not empty:
            return True
        names, remedy = ", ".join(empty), "raise validation.fraction before training"
        if len(empty) < len(chosen):
            self.notes.append(f"losses by source are not measured of {names}: no document of it is held out: {remedy}")
            return True
        if "loss" in self.section.model_fields_set:
            raise DataError(
                f"{self._place()}: results.loss: no document of {names} is held out: {remedy}, or say loss = false"
            )
        self.notes.append(f"losses by source are not measured: no document of {names} is held out: {remedy}")
        return False

    @cached_property
    def _unaskable(self) -> dict[str, str]:
        """Sources that heldout cannot ask about, each with why."""
        return unaskable_sources(self.sources, str(_steps_of(self.planned)[0].config.tokenizer.path))

    def _asked_sources(self, suite: SuiteSection, place: str) -> Sequence[str]:
        """The sources that a suite heldout is about; a note names those of them that it has to leave out."""
        for title in suite.sources:
            if title not in self.sources:
                known = nearest(title, self.sources)
                raise ConfigError(f"{place}: sources: {title!r} is no source of the study: {known}")
        chosen = suite.sources or list(self.sources)
        left_out = {title: why for title, why in self._unaskable.items() if title in chosen}
        words = [f"{title}: {why}" for title, why in left_out.items()]
        if left_out and (suite.sources or len(left_out) == len(chosen)):
            raise DataError(
                f"{place}: cannot be asked about {'; '.join(words)}. Raise validation.fraction before training (never "
                "after: what is held out then has been trained on), give the source more documents, or leave "
                + ("it out of sources" if suite.sources else "the suite out")
            )
        self.notes += [f"suite {suite.name} leaves out source {one}" for one in words]
        return chosen

    def _check_held_out(self, what: str, remedy: str) -> None:
        if not self._fractions[0]:
            raise ConfigError(
                f"{self._place()}: results.{what} is about held-out documents, and validation.fraction is 0: set it "
                f"before training, for example to 0.005, or say {remedy}"
            )
        if not any(source.order is not None for source in self.sources.values()):
            raise ConfigError(
                f"{self._place()}: results.{what} needs data, and every source is planned by its size alone: give "
                f"sources their data, or say {remedy}"
            )

    def _suite(self, suite: SuiteSection) -> str:
        """The content of what a suite asks, as a hash."""
        place = f"{self._place()}: results.suites: {suite.name}"
        if suite.of == HELDOUT:
            self._check_held_out(f"suites: {suite.name}", "leave it out")
            if len(self._fractions) > 1:
                words = " and ".join(map(str, self._fractions))
                raise ConfigError(
                    f"{place}: arms hold out different fractions of documents ({words}), so that they cannot be asked "
                    "about the same: give all the same validation.fraction, or leave the suite out"
                )
            contents = {title: _identity(self.sources[title]) for title in self._asked_sources(suite, place)}
            return key_of(sources=contents, fraction=self._fractions[0])
        if suite.of == HARNESS:
            if suite.include_path is None:
                if not suite.online:
                    raise ConfigError(
                        f"{place}: tasks of lm-evaluation-harness fetch their data: say online = true, or include_path "
                        "= a folder with task files of your own"
                    )
                return HARNESS
            folder = self.folder / suite.include_path
            if not folder.is_dir():
                raise ConfigError(f"{place}: include_path = {suite.include_path!r}: no such folder as {folder}")
            return content_of(folder)
        try:
            found = read_suite(self._suite_name(suite)).select(suite.tasks)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None
        return self._suite_data(suite, found, place)

    def _suite_data(self, suite: SuiteSection, found: Suite, place: str) -> str:
        try:
            check_programs(found.tasks, suite)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None
        folder = None if suite.data is None else self.folder / suite.data
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"{place}: data = {suite.data!r}: no such folder as {folder}")
        files = {task.name: find_file(task, folder) for task in found.tasks}
        missing = [t for t in found.tasks if files[t.name] is None and not (suite.online and (t.hub or t.harness))]
        if missing and (not suite.skip_missing or len(missing) == len(found.tasks)):
            words = missing_words(found.name, missing, folder)
            for option, key in (
                ("--data DIR", "data = DIR"),
                ("--online", "online = true"),
                ("--skip-missing", "skip_missing = true"),
            ):
                words = words.replace(option, key)
            raise DataError(f"{place}: nothing is evaluated: {words}")
        contents = {name: None if path is None else content_of(path) for name, path in files.items()}
        return key_of(tasks=[task.model_dump(mode="json") for task in found.tasks], contents=contents)

    def _suite_name(self, suite: SuiteSection) -> str:
        return str(self.folder / suite.of) if suite.of.endswith(".toml") else suite.of

    def _suite_words(self, suite: SuiteSection, called: str) -> tuple[str, ...]:
        """Arguments of `stagemix evaluate` but for --output, --model's path and --config."""
        section = self.section
        words = [f"--device={section.device}", f"--dtype={section.dtype}", f"--batch-size={section.batch_size}"]
        words += [f"--seed={suite.seed}"]
        if suite.of != HARNESS:
            words.append(f"--suite={self._suite_name(suite)}")
        words += [f"--source={title}" for title in suite.sources]
        if suite.tasks:
            words.append(f"--tasks={','.join(suite.tasks)}")
        if suite.include_path:
            words.append(f"--include-path={self.folder / suite.include_path}")
        if suite.data:
            words.append(f"--data={self.folder / suite.data}")
        for key in ("limit", "max_new_tokens"):
            if getattr(suite, key) is not None:
                words.append(f"--{key.replace('_', '-')}={getattr(suite, key)}")
        numbers = (
            "questions",
            "passages",
            "samples",
            "temperature",
            "top_p",
            "program_seconds",
            "program_memory",
            "jobs",
        )
        words += [f"--{key.replace('_', '-')}={getattr(suite, key)}" for key in numbers]
        words.append(f"--pass-at={','.join(map(str, suite.pass_at))}")
        flags = ("skip_missing", "online", "allow_code_execution", "trust_task_code")
        return tuple(words + [f"--{key.replace('_', '-')}" for key in flags if getattr(suite, key)])

    def _prompts(self, asked: SamplesSection | WinRateSection | None, table: str) -> list[str]:
        if asked is None:
            return []
        if isinstance(asked.prompts, list):
            return asked.prompts
        return read_prompts(self.folder / asked.prompts, f"{self._place()}: results.{table}.prompts")

    def _check_win_rate(self) -> None:
        asked = self.section.win_rate
        if asked is None:
            return
        if self.planned.study.words.study.baseline is None:
            raise ConfigError(
                f"{self._place()}: results.win_rate is against the baseline: name it, study.baseline = ARM"
            )
        if asked.judge is not None and not self._judge(asked.judge):
            raise ConfigError(f"{self._place()}: results.win_rate.judge is empty: give a command line")
        if asked.judge_model is not None and not (self.folder / asked.judge_model).is_dir():
            raise ConfigError(
                f"{self._place()}: results.win_rate.judge_model: no such folder as {self.folder / asked.judge_model}"
            )

    def _judge(self, command: str) -> list[str]:
        try:
            return shlex.split(command)
        except ValueError as error:
            raise ConfigError(f"{self._place()}: results.win_rate.judge = {command!r}: {error}") from None

    def _place(self) -> str:
        return self.planned.study.place("results")


def read_prompts(path: Path, place: str) -> list[str]:
    """Prompts of a file: .jsonl with {"prompt": …} in each line, else a prompt in each line but blank ones.

    Raises DataError with `place`, file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{place}: {path}: cannot be read: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            found.append(line.removesuffix("\r"))
            continue
        try:
            text = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str) or not text:
            raise DataError(f'{place}: {path}, line {number}: {{"prompt": TEXT}} is needed; it is {line[:80]}')
        found.append(text)
    if not found:
        raise DataError(f"{place}: {path}: holds no prompt")
    return found


def _generate_words(asked: SamplesSection | WinRateSection, dtype: str) -> tuple[str, ...]:
    """Arguments of `stagemix generate` but for --model and --prompts."""
    words = [f"--max-new-tokens={asked.max_new_tokens}", f"--temperature={asked.temperature}", f"--top-p={asked.top_p}"]
    words += [f"--seed={asked.seed}", f"--dtype={dtype}", "--jsonl"]
    if isinstance(asked, SamplesSection):
        words += [f"--samples={asked.samples}", f"--top-k={asked.top_k}", f"--min-p={asked.min_p}"]
        words += [f"--repetition-penalty={asked.repetition_penalty}", *(f"--stop={text}" for text in asked.stop)]
    if asked.begin_with is not None:
        words.append(f"--begin-with={asked.begin_with}")
    return tuple(words)


def _steps_of(planned: PlannedStudy) -> Sequence[Any]:
    return [step for node in planned.graph.nodes.values() for step in trained(node.step)[-1:]]


def _sources_of(planned: PlannedStudy) -> dict[str, OpenSource]:
    """The sources of all arms by name. Where arms have different data under one name, all of them: NAME@ARM."""
    found: dict[str, OpenSource] = {}
    for step in _steps_of(planned):
        for name, source in step.run.sources.items():
            known = [title for title in found if title == name or title.startswith(f"{name}@")]
            if any(_identity(found[title]) == _identity(source) for title in known):
                continue
            found[f"{name}@{step.arm}" if known else name] = source
    return dict(sorted(found.items()))


def _identity(source: OpenSource) -> list[str]:
    """What decides which documents a source has, and what of them is marked; not how many are held out."""
    if source.order is None:
        return [source.fingerprint]
    files, ends = source.order.files, [str(end) for end in source.section.slice]
    return [*files.file_fingerprints, *ends, files.mask_checksum or ""]
