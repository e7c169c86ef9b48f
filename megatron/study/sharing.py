"""What arms share, and what they fail to share and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.data.weight_function import WeightFunction
from megatron.study.graph import Graph
from megatron.study.identity import Document
from megatron.study.mixture_in_words import mixture_in_words
from megatron.study.overrides import Override
from megatron.study.steps import ResolvedArm, TrainStep
from megatron.study.what_counts import ruling_of

_ORDER = (
    "run", "tokenizer", "model", "validation", "optimizer", "train", "kernels", "spikes", "weights_from", "stage",
    "take", "lr", "sources",
)  # fmt: skip
"""Of differences that are told: what a user writes first, what follows from it after."""


@dataclass(frozen=True)
class Lost:
    """A stage that arms say in the same words and that is not one node.

    arms, others: those of the first node, and of this one · key: the first thing in which they differ, with both
    values · more: further keys · by: which `set` or axis says it · asked: it names the stage itself · tokens: of the
    other node, which is trained besides.
    """

    stage: str
    arms: tuple[str, ...]
    others: tuple[str, ...]
    key: str
    values: tuple[str, str]
    more: tuple[str, ...]
    by: tuple[str, ...]
    asked: bool
    tokens: int

    def words(self) -> str:
        """For people."""
        by = f" (by {', '.join(self.by)})" if self.by else ""
        more = f", and {len(self.more)} more: {', '.join(self.more[:4])}" if self.more else ""
        return (
            f"{_names(self.others)} {_do(self.others)} not share stage {self.stage!r} with {_names(self.arms)}: "
            f"{self.key} is {self.values[0]} there and {self.values[1]} here{by}{more}"
        )


def lost_sharing(arms: Mapping[str, ResolvedArm], graph: Graph) -> list[Lost]:
    """Stages with the same words after the same node, that came out as several nodes; only where arms part first."""
    found: dict[tuple[str, str | None], dict[str, list[tuple[str, TrainStep]]]] = {}
    seed = graph.arms[0].seed
    for placed in (arm for arm in graph.arms if arm.seed == seed):
        above: str | None = None
        for step, node in zip(arms[placed.name].steps, placed.path, strict=True):
            if isinstance(step, TrainStep) and step.library:
                found.setdefault((step.library, above), {}).setdefault(node, []).append((placed.name, step))
            above = node
    lost = []
    for (library, _), nodes in found.items():
        seen = list(nodes)[:1]
        for other in list(nodes)[1:]:
            tokens = graph.nodes[other].tokens
            pairs = [
                _compared(
                    library,
                    nodes[node],
                    nodes[other],
                    differences(graph.nodes[node].document, graph.nodes[other].document),
                    tokens,
                )
                for node in seen
            ]
            # the nearest; of several the one whose difference nobody asked for
            lost.append(min(pairs, key=lambda pair: (len(pair.more), pair.asked)))
            seen.append(other)
    return lost


def _compared(
    library: str,
    mine: Sequence[tuple[str, TrainStep]],
    theirs: Sequence[tuple[str, TrainStep]],
    changes: Sequence[tuple[str, tuple[str, str]]],
    tokens: int,
) -> Lost:
    """Two nodes by the first arm of each: what their overrides have not in common is what made them two."""
    (key, values), more = changes[0], tuple(key for key, _ in changes[1:])
    here, there = ({(one.key, repr(one.value)): one for one in step.overrides} for step in (mine[0][1], theirs[0][1]))
    keys = {key for key, _ in changes}
    made = [one for word, one in (here | there).items() if (word in here) != (word in there) and _matters(one, keys)]
    label = mine[0][1].label
    about = [one for one in made if one.key == key] or [one for one in made if one.stage in (None, label)] or made
    by = tuple(dict.fromkeys(f"{one.by}: {one.key}" for one in about))
    asked = bool(made) and all(one.stage == label for one in made)
    names, others = tuple(name for name, _ in mine), tuple(name for name, _ in theirs)
    return Lost(library, names, others, key, values, more, by, asked, tokens)


def _matters(override: Override, changed: set[str]) -> bool:
    """Whether an override can have made two nodes of one, whose documents differ in these keys."""
    table, _, rest = override.key.partition(".")
    key = f"sources.*.{rest.partition('.')[2]}" if table == "sources" else override.key
    row = ruling_of(key)
    if row is None or row.ruling == "resolved":
        return True
    return row.ruling == "counts" and (table == "sources" or override.key in changed)


def differences(one: Document, other: Document) -> list[tuple[str, tuple[str, str]]]:
    """Keys in which two documents differ, with both values in words; what a user writes first."""
    here, there = dict(_leaves(one)), dict(_leaves(other))
    sources = {f"sources.{name}" for name in {*one.get("sources", {})} ^ {*other.get("sources", {})}}
    keys = [
        key
        for key in dict.fromkeys([*here, *there])
        # a source that only one of them has is told by the mixture
        if here.get(key) != there.get(key) and key.rpartition(".")[0] not in sources
    ]
    keys.sort(key=lambda key: _ORDER.index(top) if (top := key.split(".")[0]) in _ORDER else len(_ORDER))
    return [(key, _both(key, here.get(key), there.get(key))) for key in keys]


def _both(key: str, one: Any, other: Any) -> tuple[str, str]:
    """Two values that differ, so that it is seen."""
    shown = _shown(key, one), _shown(key, other)
    if shown[0] == shown[1] and key == "stage.mixture":
        return f"{shown[0]}{_begins(one)}", f"{shown[1]}{_begins(other)}"
    return shown


def _begins(mixture: Any) -> str:
    starts = ", ".join(f"{segment.start:,}" for segment in WeightFunction.from_json(mixture).segments)
    return f" (steps begin at samples {starts})"


def _leaves(document: Document, place: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in document.items():
        if isinstance(value, dict) and key != "mixture":
            leaves += _leaves(value, f"{place}{key}.")
        else:
            leaves.append((f"{place}{key}", value))
    return leaves


def _shown(key: str, value: Any) -> str:
    if value is None:
        return "absent"
    if key == "stage.mixture":
        return "{" + mixture_in_words(value) + "}"
    words = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return words if len(words) <= 80 else words[:79] + "…"


# -- arms that are the same -----------------------------------------------------------------------------------------


def same_arms(graph: Graph) -> list[tuple[str, ...]]:
    """Arms that end with the same node, in groups."""
    groups: dict[str, list[str]] = {}
    seed = graph.arms[0].seed
    for arm in graph.arms:
        if arm.seed == seed:
            groups.setdefault(arm.path[-1], []).append(arm.name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return (
        f"arm {shown}"
        if len(names) == 1
        else f"arms {shown}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    )


def _do(names: Sequence[str]) -> str:
    return "does" if len(names) == 1 else "do"
