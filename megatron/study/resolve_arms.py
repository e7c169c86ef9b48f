"""From arms in words to resolved steps: each arm through `planner/resolve.py`, a branch with the ledger of its trunk.

So the plan of a study sees the order of samples that its runs will see, and what a resume would refuse of a branch is
refused here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from megatron.config.errors import ChangedPastError, ConfigError, StagemixError
from megatron.config.load import config_from_tables
from megatron.config.schema import RunConfig, StageSection
from megatron.data.ledger import Ledger
from megatron.data.mixture_words import MixtureWords
from megatron.data.sources import OpenSource, TokenizerIdentity
from megatron.data.stage_objective import OF_LOSS_TOKENS
from megatron.planner.resolve import ResolvedRun, cache_folder, open_run_sources, resolve_run
from megatron.study.arm_places import ArmPlaces
from megatron.study.arms import ArmWords
from megatron.study.branches import check_branch
from megatron.study.caps import capped
from megatron.study.identity import shape_of, tokenizer_identity, unlike_models
from megatron.study.learned_weights import LearnedWeights, read_weights
from megatron.study.overrides import StageWords
from megatron.study.sections import StudyStage
from megatron.study.steps import (
    AverageStep,
    ResolvedArm,
    Step,
    TrainStep,
    planned_ledger,
    regular_steps,
    trained,
)
from megatron.study.study_file import Study, check_stage, nearest

_OF_THE_STUDY = ("weights_from", "cap", "average", "last", "weights")


def resolve_arms(study: Study, arms: Mapping[str, ArmWords]) -> dict[str, ResolvedArm]:
    """Every arm with its steps; those that others branch from are resolved once. Raises ConfigError, DataError."""
    resolver = _Resolver(study, arms)
    return {name: resolver.arm(name) for name in arms}


@dataclass(frozen=True)
class _Own:
    """A stage that an arm adds: its words, and where its mixture is from."""

    words: StageWords
    stage: StudyStage
    learned: LearnedWeights | None = None


class _Sources:
    """Opened sources, once for all arms that have the same."""

    def __init__(self) -> None:
        self._known: dict[str, Mapping[str, OpenSource]] = {}

    def of(self, config: RunConfig, identity: TokenizerIdentity | None) -> Mapping[str, OpenSource]:
        """Those of a config."""
        rows = {name: one.model_dump(mode="json") for name, one in config.sources.items()}
        beside = (config.model.seq_length, str(config.validation.fraction), identity, str(cache_folder(config)))
        key = repr((sorted(rows.items()), beside))
        if key not in self._known:
            self._known[key] = open_run_sources(config, identity)
        return self._known[key]


class _Resolver:
    def __init__(self, study: Study, arms: Mapping[str, ArmWords]) -> None:
        self._study = study
        self._arms = arms
        self._resolved: dict[str, ResolvedArm] = {}
        self._open: list[str] = []
        self._sources = _Sources()

    def arm(self, name: str) -> ResolvedArm:
        """The arm, resolved when it is first asked for."""
        if name not in self._resolved:
            if name in self._open:
                circle = " -> ".join([*self._open[self._open.index(name) :], name])
                raise ConfigError(
                    f"{self._arms[name].place}: arms need each other in a circle, by from or average: {circle}: one of "
                    "them must do without"
                )
            self._open.append(name)
            words = self._arms[name]
            self._resolved[name] = self._fresh(words).resolve(self._before(words), self._step)
            self._open.pop()
        return self._resolved[name]

    def _fresh(self, words: ArmWords) -> _Arm:
        return _Arm(self._study, words, self._where(words), self._sources)

    def _where(self, words: ArmWords) -> str:
        return f"{words.place}: arm {words.name!r}"

    def _before(self, words: ArmWords) -> Step | None:
        return None if words.parent is None else self._step(words.parent, words, "from")

    def _step(self, reference: str, words: ArmWords, key: str) -> Step:
        """The step that "arm/stage" means; "arm" is its last."""
        where = f"{self._where(words)}: {key} = {reference!r}"
        name, slash, label = reference.partition("/")
        if name not in self._arms:
            raise ConfigError(f"{where}: there is no arm {name!r}: {self._near(name)}")
        steps = self.arm(name).steps
        if not slash:
            return steps[-1]
        found = [step for step in steps if step.label == label]
        if not found:
            known = nearest(label, [step.label for step in steps], f"stages of {name} are")
            raise ConfigError(f"{where}: arm {name!r} has no stage {label!r}: {known}")
        return found[-1]

    def _near(self, name: str) -> str:
        points = [arm.name for arm in self._arms.values() if arm.table == name]
        if points:  # one that axes have made several of
            return f"the axes of [arms.{name}] make {', '.join(points)} of it: name one of them"
        return nearest(name, self._arms, "arms are")


class _Arm:
    """One arm on its way."""

    def __init__(self, study: Study, words: ArmWords, where: str, sources: _Sources) -> None:
        self._sources = sources
        self._study = study
        self._words = words
        self._where = where
        self._notes: dict[str, list[str]] = {}

    def resolve(self, before: Step | None, step_of: Any) -> ResolvedArm:
        """before: what it branches from · step_of: (reference, arm, key) to a step of another arm."""
        groups = self._groups()
        own = [self._own(stage, groups) for stage in self._words.stages]
        head = own[0].stage
        first: Step | None = before
        if head.average is not None:
            if before is not None:
                raise ConfigError(
                    f"{self._where}: says from, and begins with an average, which says it itself: keep one"
                )
            first = self._average(own[0], tuple(step_of(one, self._words, "average") for one in head.average))
        if misplaced := next((one for one in own[1:] if one.stage.average is not None), None):
            raise ConfigError(
                f"{self._where}: stage {misplaced.words.name!r} averages checkpoints of other arms, and training "
                "before it would be for nothing: put it first, or use last = N"
            )
        if head.last and before is None:
            raise self._nothing_before(own[0])
        chain = trained(first)
        trains = [one for one in own if not one.stage.averages]
        config, run = self._config(chain, trains)
        return self._laid(own, first, before, config, run, len(chain))

    def _laid(
        self,
        own: list[_Own],
        first: Step | None,
        before: Step | None,
        config: RunConfig,
        run: ResolvedRun | None,
        index: int,
    ) -> ResolvedArm:
        """The steps in order, each upon the one before it."""
        steps = _path(before)
        here = first
        for number, one in enumerate(own):
            if number == 0 and one.stage.average is not None:
                assert first is not None
                steps.append(first)
                continue
            if one.stage.averages:
                if not isinstance(here, TrainStep):
                    raise self._nothing_before(one)
                here = self._average(one, (here,))
            else:
                assert run is not None
                step = self._train(one, config, run, index, here)
                if here is not None and (number == 0 or isinstance(here, AverageStep)):
                    check_branch(here, step, self._where)
                here, index = step, index + 1
            steps.append(here)
        labels = [step.label for step in steps]
        if twice := next((label for label in labels if labels.count(label) > 1), None):
            raise ConfigError(
                f"{self._where}: has two stages {twice!r}: give one another name, "
                f'{{ use = "{twice}", name = "{twice}-2" }}'
            )
        words = self._words
        return ResolvedArm(words.name, words.table, words.experiment, words.place, tuple(steps))

    def _nothing_before(self, one: _Own) -> ConfigError:
        return ConfigError(
            f"{self._where}: stage {one.words.name!r} averages the last {one.stage.last} checkpoints of the stage "
            "before it, and no training stage is there: put it behind one"
        )

    def _train(self, one: _Own, config: RunConfig, run: ResolvedRun, index: int, before: Step | None) -> TrainStep:
        words = one.words
        notes = tuple(self._notes.get(words.name, ()))
        overrides = self._words.overrides
        return TrainStep(
            words.name, words.library, self._words.name, config, run, index, before, one.learned, notes, overrides
        )

    def _average(self, one: _Own, members: tuple[Step, ...]) -> AverageStep:
        stage, words = one.stage, one.words
        count = stage.last or len(members)
        weights = [Fraction(weight) for weight in stage.weights or []] or [Fraction(1)] * count
        shares = tuple(weight / sum(weights) for weight in weights)
        self._check_alike(words.name, members)
        every = 0
        if stage.last:
            behind = trained(members[0])[-1]
            every = behind.config.checkpoint.every
            there = len(regular_steps(behind.stage.start_step, behind.stage.end_step, every))
            if there < stage.last:
                raise ConfigError(
                    f"{self._where}: stage {words.name!r} averages {stage.last} checkpoints, and stage "
                    f"{behind.label!r} saves {there} ({behind.stage.steps:,} steps, checkpoint.every {every}): set a "
                    "smaller checkpoint.every"
                )
        return AverageStep(
            words.name,
            words.library,
            self._words.name,
            members,
            shares,
            stage.last or 0,
            every,
            (),
            self._words.overrides,
        )

    def _check_alike(self, label: str, members: tuple[Step, ...]) -> None:
        """Raises ConfigError for models that have no mean: what `average_checkpoints` would refuse when all is
        trained."""
        first, *others = (trained(member)[-1] for member in members)
        for member, other in zip(members[1:], others, strict=True):
            if found := unlike_models(first, other):
                raise ConfigError(
                    f"{self._where}: stage {label!r} averages {members[0].arm}/{members[0].label} and "
                    f"{member.arm}/{member.label}, which cannot be averaged: of the second {'; '.join(found)}: only "
                    "models of one architecture, vocabulary, tokenizer and held-out documents have a mean"
                )

    # -- words -------------------------------------------------------------------------------------------------------

    def _groups(self) -> dict[str, str]:
        """The group of each source, as far as the tables say one; what is wrong with them the config will tell."""
        sources = self._words.tables.get("sources")
        if not isinstance(sources, dict):
            return {}
        return {
            name: str(table.get("group", name)) if isinstance(table, dict) else name for name, table in sources.items()
        }

    def _own(self, words: StageWords, groups: Mapping[str, str]) -> _Own:
        stage = check_stage(words.tables, f"stages.{words.name}", self._words.place)
        where = f"{self._where}: stage {words.name!r}"
        if stage.cap is not None and (
            stage.mixture is None and stage.weights_from is None or stage.ramp_to is not None
        ):
            raise ConfigError(
                f"{where}: cap limits the shares of mixture or weights_from, constant over the stage: say it so"
            )
        if stage.cap is not None and stage.epochs is not None:
            raise ConfigError(
                f"{where}: its length in epochs depends on the cap: give it tokens, steps, samples or a share"
            )
        if stage.weights_from is None:
            return _Own(words, stage)
        if stage.mixture is not None:
            raise ConfigError(f"{where}: says both mixture and weights_from: give one")
        learned = read_weights(stage.weights_from, self._study.path.parent, groups, where)
        note = f"weights of {learned.file} ({learned.form}, sha256 {learned.sha256[:12]})"
        self._notes.setdefault(words.name, []).append(note)
        return _Own(words, stage, learned)

    def _tables_of(self, one: _Own) -> dict[str, Any]:
        tables = {key: value for key, value in one.words.tables.items() if key not in _OF_THE_STUDY}
        if one.learned is not None:
            tables["mixture"] = dict(one.learned.weights)
        return {"name": one.words.name, **tables}

    # -- config ------------------------------------------------------------------------------------------------------

    def _config(self, chain: list[TrainStep], own: list[_Own]) -> tuple[RunConfig, ResolvedRun | None]:
        """The config of all training stages, and what it comes to; of an arm without stages of its own, its trunk's."""
        if not own:
            return chain[-1].config, None
        study, words = self._study.words.study, self._words
        trunk: list[Any] = [step.section for step in chain]
        groups = self._groups()
        trained_before = {one.name for one in trunk}  # what refers to such a name means the stage that was trained
        referred = [stage for stage in words.templates if stage.name not in trained_before]
        templates: list[Any] = [self._tables_of(self._own(stage, groups)) for stage in referred]
        templates = [*words.tables.get("templates", []), *templates]
        known = {table.get("name") for table in templates if isinstance(table, dict)}
        inherited = chain[-1].config.templates if chain else []
        tables = {
            **words.tables,
            "run": {
                "name": f"{study.name}/{words.name}",
                "output": f"{study.output}/nodes/{words.name}",
                "seed": study.seeds[0],
            },
            "stages": [*trunk, *(self._tables_of(one) for one in own)],
            "templates": [*(one for one in inherited if one.name not in known), *templates],
        }
        config = config_from_tables(tables, ArmPlaces(self._where, study=self._study, sets=words.overrides))
        ledger = planned_ledger(chain)
        if any(one.stage.cap for one in own):
            config = self._with_caps(config, own, len(chain), ledger)
        return config, self._resolved(config, planned_ledger(chain), chain)

    def _resolved(
        self, config: RunConfig, ledger: Ledger | None, chain: list[TrainStep], sources_of: RunConfig | None = None
    ) -> ResolvedRun:
        any_data = any(section.data for section in config.sources.values())
        identity = tokenizer_identity(config.tokenizer.path) if any_data else None
        try:
            opened = self._sources.of(sources_of or config, identity)
            run = resolve_run(config, ledger=ledger, tokenizer=identity, opened=opened)
            shape_of(config, max(stage.shapes.longest_sequence for stage in run.schedule.stages))
            return run
        except ChangedPastError as error:
            lines = [line.strip() for line in str(error).splitlines()[1:-1]]
            raise ConfigError(
                f"{self._where}: branches from {chain[-1].arm}/{chain[-1].label} and changes what that was trained on: "
                f"{'; '.join(lines)}: put it back, or list the arm's stages without from, and they are trained anew"
            ) from None
        except StagemixError as error:
            raise type(error)(f"{self._where}: {error}") from None

    def _with_caps(self, config: RunConfig, own: list[_Own], begun: int, ledger: Ledger | None) -> RunConfig:
        """The config with the mixtures that caps leave. Lengths don't depend on them.

        A cap is on what is read: on shares of samples, whatever the stage's weights are shares of, and of a padded one
        an epoch is a sample of each of its documents.
        """
        free = {name: section.model_copy(update={"dry": "repeat"}) for name, section in config.sources.items()}
        run = self._resolved(config.model_copy(update={"sources": free}), ledger, [], sources_of=config)
        sizes = {name: source.epoch_tokens for name, source in run.sources.items()}
        groups = {name: source.group for name, source in run.sources.items()}
        stages: list[StageSection] = list(config.stages)
        for number, one in enumerate(own, begun):
            if one.stage.cap is None:
                continue
            section, where = stages[number], f"{self._where}: stage {one.words.name!r}"
            cap = one.stage.cap
            stage = run.schedule.stages[number]
            over = {"run": run.schedule.tokens, "stage": stage.tokens}.get(str(cap.over)) or int(cap.over)
            epochs, of = dict(sizes), ""
            if stage.documents is not None:
                epochs |= {name: epoch.samples * stage.documents.seq_length for name, epoch in stage.padded.items()}
            if stage.documents is not None or section.weigh_by != "samples":
                flat, of = {name: stage.weights.weight(name, 0) for name in stage.weights.sources}, " of samples"
            else:
                mixture = {name: Fraction(weight) for name, weight in (section.mixture or {}).items()}
                flat = MixtureWords(groups, sizes, section.within, where).flat(mixture)
            result = capped(flat, epochs, cap.epochs, over, where)
            update = {"mixture": dict(result.shares), "within": {}, "weigh_by": "samples"}
            stages[number] = section.model_copy(update=update)
            notes = self._notes.setdefault(one.words.name, [])
            notes += [note for note in stage.notes if OF_LOSS_TOKENS in note]
            notes.append(result.words(cap.epochs, over, stage.tokens, of))
        return config.model_copy(update={"stages": stages})


def _path(before: Step | None) -> list[Step]:
    """The steps from the beginning to one, along its first parents."""
    path: list[Step] = []
    while before is not None:
        path.append(before)
        if isinstance(before, AverageStep):
            # what an average of several arms has behind it is theirs
            before = before.members[0] if before.last else None
        else:
            before = before.before
    return path[::-1]
