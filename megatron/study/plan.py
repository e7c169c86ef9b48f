"""The plan of a study as plain values, so that the terminal, JSON and the page show the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megatron.config.errors import ConfigError
from megatron.planner.plan import plan_of
from megatron.planner.plan_warnings import GRAVITIES, warnings_of
from megatron.study.arms import arms_of, unused_words
from megatron.study.asked_names import unknown_names
from megatron.study.costs import NodeTime, node_disk
from megatron.study.graph import Graph, Node, PlacedArm, graph_of
from megatron.study.mixture_in_words import mixture_in_words
from megatron.study.order_controls import same_aggregates, unequal_controls, unlike_controls
from megatron.study.resolve_arms import resolve_arms
from megatron.study.sharing import lost_sharing, same_arms
from megatron.study.steps import ResolvedArm, TrainStep, trained
from megatron.study.study_file import Study, load_study, nearest, with_seeds


@dataclass(frozen=True)
class PlannedStudy:
    """A study whose nodes are known. arms: those that were asked for; notes: on the file."""

    study: Study
    arms: Mapping[str, ResolvedArm]
    graph: Graph
    notes: tuple[str, ...]


def plan_study(path: Path, only: Iterable[str] = (), seeds: Sequence[int] = ()) -> PlannedStudy:
    """Reads, resolves and links a study. only: names or patterns of arms; default all. seeds: instead of study.seeds.

    Raises ConfigError, DataError.
    """
    study = load_study(path)
    if seeds:
        study = with_seeds(study, seeds)
    words = arms_of(study)
    chosen = _chosen(list(words), list(only))
    arms = resolve_arms(study, words)
    resolved = {name: arm for name, arm in arms.items() if name in chosen}
    graph = graph_of(resolved, study.words.study.seeds, arms)
    return PlannedStudy(study, resolved, graph, (*study.notes, *unused_words(study, words)))


def _chosen(names: list[str], patterns: list[str]) -> set[str]:
    if not patterns:
        return set(names)
    found: set[str] = set()
    for pattern in patterns:
        matching = {name for name in names if fnmatchcase(name, pattern)}
        if not matching:
            raise ConfigError(f"--arm {pattern}: no arm is called so: {nearest(pattern, names, 'arms are')}")
        found |= matching
    return found


def study_plan(planned: PlannedStudy, times: Mapping[str, NodeTime] | None = None) -> dict[str, Any]:
    """The whole plan as JSON values.

    Keys: "study", "file", "seeds", "baseline"; "trained" and "naive" tokens with "ratio"; "nodes" (each with "id",
    "parents", "labels", "arms", "tokens", "steps", "disk_bytes" and, with times, "gpu_hours"); "arms" (each with its
    path, its tokens and "stages" in words); "experiments" with their tokens; "shared" trunks; "lost" sharing;
    "same_arms"; "same_aggregate"; "warnings".
    """
    graph, section = planned.graph, planned.study.words.study
    nodes = [_node_row(node, times, graph.averaged.get(node.id, ())) for node in graph.nodes.values()]
    plan: dict[str, Any] = {
        "study": section.name,
        "file": str(planned.study.path),
        "output": section.output,
        "seeds": list(section.seeds),
        "baseline": section.baseline,
        "trained": graph.trained,
        "naive": graph.naive,
        "ratio": graph.trained / graph.naive if graph.naive else 1.0,
        "nodes": nodes,
        "arms": [_arm_row(planned, arm) for arm in graph.arms],
        "experiments": _experiments(graph),
        "shared": [row for row in nodes if row["kind"] == "train" and len(row["arms"]) > 1],
        "lost": [asdict(one) | {"text": one.words()} for one in lost_sharing(planned.arms, graph)],
        "same_arms": [list(names) for names in same_arms(graph)],
        "same_aggregate": [asdict(one) for one in same_aggregates(planned.arms)],
    }
    if times is not None:
        known = [row["gpu_hours"] for row in nodes if row["gpu_hours"] is not None]
        plan["gpu_hours"] = sum(known) if len(known) == len(nodes) else None
    disks = [row["disk_bytes"] for row in nodes]
    plan["disk_bytes"] = None if None in disks else sum(disks)
    plan["warnings"] = _warnings(planned, plan)
    return plan


def _node_row(node: Node, times: Mapping[str, NodeTime] | None, averaged: Sequence[int]) -> dict[str, Any]:
    step, disk = node.step, node_disk(node, averaged)
    row: dict[str, Any] = {
        "id": node.id,
        "kind": node.kind,
        "seed": node.seed,
        "label": node.label,
        "labels": list(node.labels),
        "parents": list(node.parents),
        "arms": list(node.arms),
        "tokens": node.tokens,
        "steps": step.stage.steps if isinstance(step, TrainStep) else 0,
        "mixture": mixture_in_words(step.stage.weights, step.stage.samples) if isinstance(step, TrainStep) else "",
        "disk_bytes": disk.total if disk else None,
    }
    if times is not None:
        row["gpu_hours"] = times[node.id].gpu_hours if node.id in times else None
    return row


def _arm_row(planned: PlannedStudy, arm: PlacedArm) -> dict[str, Any]:
    resolved = planned.arms[arm.name]
    return {
        "name": arm.name,
        "seed": arm.seed,
        "experiment": arm.experiment,
        "path": list(arm.path),
        "tokens": arm.naive,
        "stages": [_stage_row(step) for step in resolved.steps],
    }


def _stage_row(step: Any) -> dict[str, Any]:
    if not isinstance(step, TrainStep):
        shares = ", ".join(f"{float(weight * 100):.3g} %" for weight in step.weights)
        steps = ", ".join(f"{one:,}" for one in step.last_steps)
        of = (
            f"the last {step.last} of {step.members[0].label} (steps {steps})"
            if step.last
            else ", ".join(f"{member.arm}/{member.label}" for member in step.members)
        )
        return {"label": step.label, "tokens": 0, "words": f"average of {of}: {shares}", "notes": list(step.notes)}
    row = {
        "label": step.label,
        "tokens": step.stage.tokens,
        "words": mixture_in_words(step.stage.weights, step.stage.samples),
        "notes": list(step.notes),
    }
    if step.learned is not None:
        row["weights_from"] = step.learned.to_json()
    return row


def _experiments(graph: Graph) -> list[dict[str, Any]]:
    names = dict.fromkeys(arm.experiment for arm in graph.arms)
    rows = []
    for name in names:
        arms = [arm for arm in graph.arms if arm.experiment == name]
        once, naive = graph.tokens_of(arms)
        count = len({arm.name for arm in arms})
        rows.append(
            {
                "experiment": name,
                "arms": count,
                "trained": once,
                "naive": naive,
                "ratio": once / naive if naive else 1.0,
            }
        )
    return rows


# -- warnings ----------------------------------------------------------------------------------------------------------


def _warnings(planned: PlannedStudy, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What `plan` warns of each arm, each text once with its arms; and of the study as a whole. The gravest first."""
    found = _of_arms(planned)
    # What names the stage means it; what changes a trunk on its way may not.
    found += [
        {"gravity": "high", "kind": "lost-sharing", "text": row["text"]} for row in plan["lost"] if not row["asked"]
    ]
    for names in plan["same_arms"]:
        text = f"{', '.join(names)} are the same arm: trained once, and no difference between them can be found"
        found.append({"gravity": "medium", "kind": "same-arms", "text": text})
    found += [{"gravity": "medium", "kind": "unequal-control", "text": text} for text in unequal_controls(planned.arms)]
    found += [{"gravity": "medium", "kind": "unlike-control", "text": text} for text in unlike_controls(planned.arms)]
    found += unknown_names(planned.study, planned.arms)
    found += [{"gravity": "low", "kind": "study", "text": note} for note in planned.notes]
    return sorted(found, key=lambda row: GRAVITIES.index(row["gravity"]))


def _of_arms(planned: PlannedStudy) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    seen: dict[int, list[dict[str, Any]]] = {}
    unused: list[set[str]] = []
    for name, arm in planned.arms.items():
        last = trained(arm.end)[-1]
        warned = seen.get(id(last.run))
        if warned is None:
            plan = plan_of(last.run, last.config.stages, last.config.train.tokens)
            warned = seen[id(last.run)] = warnings_of(plan, last.config.tokenizer.path)
        unused.append({row["source"] for row in warned if row["kind"] == "never-used"})
        for row in warned:
            if row["kind"] != "never-used":
                rows.setdefault(row["text"], {**row, "arms": []})["arms"].append(name)
    never = sorted(set.intersection(*unused)) if unused else []
    for row in rows.values():
        if len(row["arms"]) == len(planned.arms):
            row["arms"] = []
    return [
        *rows.values(),
        *({"gravity": "medium", "kind": "never-used", "text": f"{name} is used by no arm"} for name in never),
    ]
