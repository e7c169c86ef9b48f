"""Arms that differ in nothing but the order of what they read, and stages that are meant to and don't."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron.config.schema import StageSection
from megatron.study.identity import Document, hash_of, train_document
from megatron.study.steps import ResolvedArm, Step, TrainStep, trained


@dataclass(frozen=True)
class SameAggregate:
    """Arms whose samples and tokens of each source are equal over the whole arm, in different orders, and that are
    equal in everything else that their weights depend on."""

    arms: tuple[str, ...]
    samples: Mapping[str, int]
    tokens: Mapping[str, int]


def totals(step: Step) -> tuple[dict[str, int], dict[str, int]]:
    """(samples, tokens) of each source over the training stages behind a step."""
    samples: dict[str, int] = {}
    tokens: dict[str, int] = {}
    for one in trained(step):
        for name, count in one.stage.counts.items():
            samples[name] = samples.get(name, 0) + count
            tokens[name] = tokens.get(name, 0) + one.stage.source_tokens[name]
    return samples, tokens


def same_aggregates(arms: Mapping[str, ResolvedArm]) -> list[SameAggregate]:
    """Groups of arms that are tests of order and of nothing else."""
    groups: dict[str, list[ResolvedArm]] = {}
    for arm in arms.values():
        if not isinstance(arm.end, TrainStep) or (rest := _besides_order(arm.end)) is None:
            continue
        samples, tokens = totals(arm.end)
        groups.setdefault(hash_of({"samples": samples, "tokens": tokens, "rest": rest}), []).append(arm)
    found = []
    for members in groups.values():
        orders = {_order(arm.end) for arm in members}
        if len(orders) > 1:
            samples, tokens = totals(members[0].end)
            found.append(SameAggregate(tuple(arm.name for arm in members), samples, tokens))
    return found


def _order(step: Step) -> str:
    """What decides the order of samples, whatever it is cut into."""
    return repr(
        [
            (one.stage.weights.to_json(), one.stage.samples, one.stage.shapes.to_json(), one.stage.cursor)
            for one in trained(step)
        ]
    )


def _besides_order(end: Step) -> list[Document] | None:
    """What the weights at an arm's end depend on, without the weights of the mixture: a document for each step behind
    it, and one for its sources. None behind an average of several steps, which have orders of their own."""
    documents: list[Document] = []
    by_source: list[Document] = []
    here: Step | None = end
    while here is not None:
        if not isinstance(here, TrainStep):
            if not here.last:
                return None
            documents.append({"last": here.last, "every": here.every, "weights": [str(one) for one in here.weights]})
            here = here.members[0]
            continue
        document = train_document(here, 0, None, None)
        document.pop("weights_from", None)  # where the mixture is from
        sources, stage = document.pop("sources"), dict(document["stage"])
        del stage["mixture"]
        rates, masks = stage.pop("fim"), stage.pop("masks", {})
        stage["objective"] = here.stage.objective.name
        documents.append(document | {"stage": stage})
        by_source.append({name: {**sources[name], "fim": rates.get(name), "mask": masks.get(name)} for name in sources})
        here = here.before
    whole: Document = {}
    for sources in by_source:
        whole |= sources
    # of a source that is read in several ways, which stage reads it how is part of it
    alike = all(whole[name] == one for sources in by_source for name, one in sources.items())
    return [*documents, *([whole] if alike else by_source)]


# -- controls that miss what they control ------------------------------------------------------------------------------


def unequal_controls(arms: Mapping[str, ResolvedArm]) -> list[str]:
    """Stages that are the reverse or the aggregate of another that an arm trains, and whose totals differ from it."""
    steps = {step.label: step for arm in arms.values() for step in arm.steps if isinstance(step, TrainStep)}
    words = []
    for label, step in steps.items():
        section = step.section
        single = section.aggregate_of if section.aggregate_of and len(section.aggregate_of) == 1 else [None]
        of = section.reverse or single[0]
        twin = steps.get(of or "")
        if twin is None:
            continue
        if twin.stage.samples != step.stage.samples:
            words.append(
                f"stage {label!r} is a control of the order of {of!r}, and has {step.stage.samples:,} samples where "
                f"that has {twin.stage.samples:,}: give both one length, or compare them as different amounts"
            )
            continue
        mine, theirs = step.stage.counts, twin.stage.counts
        off = {n: mine.get(n, 0) - theirs.get(n, 0) for n in {*mine, *theirs} if mine.get(n, 0) != theirs.get(n, 0)}
        if off:
            each = ", ".join(f"{name} {count:+,}" for name, count in sorted(off.items()))
            words.append(
                f"stage {label!r} is a control of the order of {of!r}, and its samples differ: {each}: choose lengths "
                "that the phases divide into whole samples"
            )
    return words


_READ = ("objective", "whole_loss", "packing", "too_long")
"""How a stage reads its data: of stages with one mixture it is hardly ever meant to differ."""


def unlike_controls(arms: Mapping[str, ResolvedArm]) -> list[str]:
    """Stages that take the mixture of another (`like`, `reverse`, `aggregate_of`), which is all that they take of it,
    and that read it in another way; of controls of order, also where length, learning rate or `take` differ."""
    trainings = [step for arm in arms.values() for step in arm.steps if isinstance(step, TrainStep)]
    words: dict[str, None] = {}
    for step in {id(one): one for one in trainings}.values():
        for key, of, keys in _references(step.section):
            if of in (one.section.name for one in trained(step.before)):
                keys = _READ  # in one arm the second goes on from the first
            twins = [one for one in trainings if one.section.name == of]
            found: list[list[str]] = [_unlike(step, one, one.section, keys) for one in twins]
            found = found or [_unlike(step, None, one, keys) for one in step.config.templates if one.name == of]
            if found and all(found):
                least: list[str] = min(found, key=len)
                remedy = "unless that is meant" if keys is _READ else "or they differ in more than order"
                text = (
                    f"stage {step.label!r} has {key} {of!r}, which is its mixture alone, and is otherwise unlike it: "
                )
                words[f"{text}{'; '.join(least)}: say the same in both, {remedy}"] = None
    return list(words)


def _references(section: StageSection) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(key, stage that it names, keys that should be alike)."""
    control = (*_READ, "seq_length", "lr", "take")
    if section.reverse is not None:
        yield "reverse =", section.reverse, control
    if section.aggregate_of:
        for name in section.aggregate_of:
            yield "aggregate_of", name, control if len(section.aggregate_of) == 1 else _READ
    if section.like is not None:
        yield "like =", section.like, _READ


def _unlike(step: TrainStep, twin: TrainStep | None, of: StageSection, keys: tuple[str, ...]) -> list[str]:
    """What differs of these keys, in words. of: the other stage's own words; twin: where an arm trains it."""
    mine, theirs = step.section, of
    found = []
    for key in keys:
        now, then = getattr(mine, key), getattr(theirs, key)
        if key == "take":
            now, then = _taken(now), _taken(then)
        elif key == "seq_length":
            length = step.config.model.seq_length
            now, then = now or length, then or (twin.config.model.seq_length if twin is not None else length)
        elif key == "lr":
            if twin is None:
                now, then = ("another law", "its own") if None not in (now, then) and now != then else ("", "")
            else:
                now, then = _law(step), _law(twin)
        if isinstance(now, dict) and isinstance(then, dict):
            both = {name for name in {*now, *then} if now.get(name) != then.get(name)}
            now, then = ({name: one[name] for name in one if name in both} for one in (now, then))
        if now != then:
            found.append(f"{key} is {_words(now)} and there {_words(then)}")
    return found


def _law(step: TrainStep) -> dict[str, Any]:
    """The law of the learning rate from the stage's own beginning: trunks may be of other lengths."""
    law = step.run.lr.law_at(step.stage.index)
    return asdict(law) | {"origin": law.origin - step.stage.start_token}


def _taken(section: Any) -> dict[str, Any]:
    return dict(section.model_dump())


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {one}" for key, one in value.items()) or "another"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "nothing"
    return str(value)
