"""Evaluates the nodes of a study that are trained, as [results] says: by processes of their own, nothing twice.

One process (`stagemix evaluate_node`) exports a node, measures losses, runs suites and generates texts, then goes on
with the next node: what it costs to load the libraries is paid once. What is there already starts no process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from megatron.config.durable_files import write_whole
from megatron.config.errors import EXIT_DONE, ConfigError, DataError
from megatron.config.load import config_to_toml
from megatron.launch.side_process import side_environment, stagemix
from megatron.preprocessing.locks import locked
from megatron.study.node_config import node_folder
from megatron.study.node_parts import DUEL, REQUEST, Evaluated, Part, Request, weights_of, write_request
from megatron.study.node_questions import HELD_OUT_CONFIG, Questions
from megatron.study.node_results import NodeResults, read_results, write_results
from megatron.study.node_state import title, trained_checkpoint
from megatron.study.node_summary import judging_part, summary_of, with_win_rate
from megatron.study.plan import PlannedStudy
from megatron.study.study_file import nearest

_LOCK_PATIENCE, _PAUSE = 5.0, 1.0
"""Seconds: for another process that evaluates the same node to end; between looks at what is done."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Ready:
    """A trained node. parts: all that is asked of it · checkpoint: at its end · weights: their fingerprint."""

    name: str
    checkpoint: Path
    weights: str
    parts: tuple[Part, ...]


def evaluate_study(
    planned: PlannedStudy, only: Sequence[str] = (), again: bool = False, threads: int = 0, say: Say = print
) -> int:
    """Evaluates what is trained of the nodes that are asked for.

    only: ids or their beginnings, labels, arms or patterns of them; default all that [results] is about. again: also
    what is done. threads: of the arithmetic; 0: as the study says.

    Gives the exit code of the first failure, else 0. Raises ConfigError, DataError for what cannot be asked at all.
    """
    questions = Questions(planned)
    for note in questions.notes:
        say(f"note: {note}")
    chosen = _chosen(planned, only, questions, say)
    ready = [one for name in chosen if (one := _ready(planned, questions, name)) is not None]
    for name in sorted(set(chosen) - {one.name for one in ready}, key=chosen.index):
        say(f"{title(planned.graph, name)}: not trained, so not evaluated")
    if only and chosen and not ready:
        raise ConfigError(f"--node {', '.join(only)}: nothing of it is trained: stagemix study run trains it")
    work = _Evaluation(planned, questions, threads or questions.section.threads, say)
    code = work.nodes(ready, again)
    if questions.section.win_rate is not None:
        code = work.duels(ready, again) or code
    if ready and not work.asked:
        say(f"{len(ready)} trained node{'s' if len(ready) > 1 else ''}: evaluated already, as [results] asks now")
    return code


def evaluation_is_current(planned: PlannedStudy, name: str, questions: Questions | None = None) -> bool:
    """Whether a node's results are there and what evaluating it now would leave: of its weights, of what is asked, with
    a win rate where both nodes have answered. Raises as `evaluate_study`.

    questions: of the study, where more than one node is looked at: they read data and prompts.
    """
    questions = questions or Questions(planned)
    one = _ready(planned, questions, name)
    if one is None or (found := _kept(node_folder(planned, name).results)) is None:
        return False
    duel = _duel_of(planned, questions, name)
    if found.failed or (duel is not None and not Evaluated(node_folder(planned, name)).holds(duel)):
        return False
    return found == _summary(planned, questions, one)


def duels_of(planned: PlannedStudy) -> dict[str, str]:
    """The end of each arm to that of the baseline with the same seed."""
    graph, baseline = planned.graph, planned.study.words.study.baseline
    against = {arm.seed: arm.path[-1] for arm in graph.arms if arm.name == baseline}
    pairs = {arm.path[-1]: against[arm.seed] for arm in graph.arms if arm.seed in against}
    return {name: other for name, other in pairs.items() if name != other}


def asked_nodes(planned: PlannedStudy) -> list[str]:
    """The nodes that [results] is about, parents first: those that arms end with, or all."""
    ends = {arm.path[-1] for arm in planned.graph.arms}
    everything = planned.study.words.results.nodes == "all"
    return [name for name in planned.graph.nodes if everything or name in ends]


def _chosen(planned: PlannedStudy, only: Sequence[str], questions: Questions, say: Say) -> list[str]:
    nodes, asked = planned.graph.nodes, asked_nodes(planned)
    if not only:
        return asked
    found: set[str] = set()
    ends: dict[str, set[str]] = {}
    for arm in planned.graph.arms:
        ends.setdefault(arm.name, set()).add(arm.path[-1])
    for word in only:
        matching = {name for name in nodes if len(word) >= 4 and name.startswith(word)}
        matching |= {name for name, node in nodes.items() if any(fnmatchcase(label, word) for label in node.labels)}
        matching |= {name for arm, path in ends.items() if fnmatchcase(arm, word) for name in path}
        if not matching:
            known = [*(label for node in nodes.values() for label in node.labels), *ends]
            raise ConfigError(f"--node {word}: no node and no arm is called so: {nearest(word, known)}")
        found |= matching
    for name in nodes:
        if name in found and name not in asked:
            say(f'{title(planned.graph, name)}: no end of an arm; [results] nodes = "all" evaluates such nodes, too')
    return [name for name in asked if name in found]


def _ready(planned: PlannedStudy, questions: Questions, name: str) -> Ready | None:
    seen = trained_checkpoint(planned, name)
    if seen is None:
        return None
    weights = weights_of(seen.path)
    return Ready(name, seen.path, weights, questions.parts(name, weights))


class _Evaluation:
    """Carries out what is asked of nodes."""

    def __init__(self, planned: PlannedStudy, questions: Questions, threads: int, say: Say) -> None:
        self._planned, self._questions, self._threads, self._say = planned, questions, threads, say
        self.asked = 0  # requests that a process was started for

    def nodes(self, ready: Sequence[Ready], again: bool) -> int:
        """Everything but duels. Gives the first failure's code."""
        code = EXIT_DONE
        with contextlib.ExitStack() as locks:
            held = [one for one in ready if self._lock(locks, one)]
            asked: list[tuple[Ready, Request]] = []
            for one in held:
                request = self._request(one, again)
                if request.parts:
                    asked.append((one, request))
            while asked:
                failed = self._process([request for _, request in asked], [one for one, _ in asked])
                code = code or failed
                asked = self._left(asked, failed)
            for one in held:
                self._summarise(one)
        return code

    def duels(self, ready: Sequence[Ready], again: bool) -> int:
        """Every node whose answers, and the baseline's of its seed, are there and were not judged yet; also where the
        baseline is what was just evaluated."""
        chosen = {one.name for one in ready}
        code = EXIT_DONE
        with contextlib.ExitStack() as locks:
            asked = []
            for name, against in duels_of(self._planned).items():
                if name not in chosen and against not in chosen:
                    continue
                request = self._duel(name, again and name in chosen)
                one = None if request is None else _ready(self._planned, self._questions, name)
                if request is not None and one is not None and self._lock(locks, one):
                    asked.append((one, request))
            if asked:
                code = self._process([request for _, request in asked])
            for one, _ in asked:
                self._summarise(one)
        return code

    def _lock(self, locks: contextlib.ExitStack, one: Ready) -> bool:
        path = node_folder(self._planned, one.name).path / ".evaluation.lock"
        held = locks.enter_context(locked(path, shared=False, patience=_LOCK_PATIENCE))
        if held is None:
            self._say(f"{title(self._planned.graph, one.name)}: another process evaluates it now")
        return held is not None

    def _request(self, one: Ready, again: bool) -> Request:
        folder = node_folder(self._planned, one.name)
        done = Evaluated(folder)
        parts = tuple(part for part in one.parts if again or not done.holds(part))
        request = Request(one.name, self._questions.called(one.name), str(folder.path), str(one.checkpoint), parts)
        if parts:
            found = _kept(folder.results)
            if found is not None and found.weights != one.weights:
                folder.results.unlink()  # figures of other weights
            config = config_to_toml(self._questions.held_out_config(one.name))
            write_whole(folder.path / HELD_OUT_CONFIG, config.encode())
            write_request(folder.path / REQUEST, request)
        return request

    def _duel(self, name: str, again: bool) -> Request | None:
        part = _duel_of(self._planned, self._questions, name)
        folder = node_folder(self._planned, name)
        if part is None or (Evaluated(folder).holds(part) and not again):
            return None
        request = Request(name, self._questions.called(name), str(folder.path), "", (part,))
        write_request(folder.path / DUEL, request)
        return request

    def _process(self, requests: Sequence[Request], nodes: Sequence[Ready] = ()) -> int:
        """Has a process carry out requests; its line for each part goes where this one's go. Gives its exit code.

        nodes: whose results are written as soon as all of theirs is there.
        """
        self.asked += len(requests)
        names = [DUEL if one.parts[0].kind == "judge" else REQUEST for one in requests]
        files = [str(Path(one.folder) / name) for one, name in zip(requests, names, strict=True)]
        with tempfile.TemporaryDirectory(prefix="stagemix-evaluation-") as scratch:
            child = subprocess.Popen(
                [*stagemix("evaluate_node"), *files, "--log", "--ends-with-stdin"],
                stdin=subprocess.PIPE,
                env=side_environment(Path(scratch), self._threads),
                start_new_session=True,  # Ctrl-C is for this process, which then ends that one
            )
            try:
                code = self._wait(child, nodes)
            finally:
                if child.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
                if child.stdin is not None:
                    child.stdin.close()
        if code < 0:
            self._say(f"the process that evaluates was killed by signal {-code}: was there too little memory?")
        return code if code >= 0 else 128 - code

    def _wait(self, child: subprocess.Popen[bytes], nodes: Sequence[Ready]) -> int:
        seen: dict[str, float] = {}
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return child.wait(_PAUSE)
            for one in nodes:
                if (stamp := Evaluated(node_folder(self._planned, one.name)).stamp()) != seen.get(one.name):
                    seen[one.name] = stamp
                    self._summarise(one, partial=False)

    def _left(self, asked: Sequence[tuple[Ready, Request]], code: int) -> list[tuple[Ready, Request]]:
        """What was not tried where the process was killed: all behind the node that it was killed over, on whose record
        that is put."""
        if code <= 128:
            return []
        for place, (one, request) in enumerate(asked):
            done = Evaluated(node_folder(self._planned, one.name))
            for part in request.parts:
                if not done.holds(part) and not done.failure(part):
                    done.failed(part, code, f"its process was killed by signal {code - 128}")
                    return list(asked[place + 1 :])
        return []

    def _summarise(self, one: Ready, partial: bool = True) -> None:
        """results.json; partial: also where something that is asked is not there, which it then names."""
        path = node_folder(self._planned, one.name).results
        found = _summary(self._planned, self._questions, one, partial)
        if found is not None and _kept(path) != found:
            write_results(path, found)
            lost = f", without {', '.join(found.failed)}, which failed" if found.failed else ""
            self._say(f"{title(self._planned.graph, one.name)}: {path}{lost}")


def _summary(planned: PlannedStudy, questions: Questions, one: Ready, partial: bool = True) -> NodeResults | None:
    """What is to stand in results.json: what is done, and why the rest is not. None where nothing was measured, and,
    but for `partial`, where a part is not done. Of a duel that is not judged yet nothing."""
    folder = node_folder(planned, one.name)
    done = Evaluated(folder)
    held = [part for part in one.parts if done.holds(part)]
    if len(held) < len(one.parts) and not (partial and any(part.kind != "export" for part in held)):
        return None
    found = summary_of(planned, questions, one.name, one.checkpoint, one.weights, one.parts)
    duel = _duel_of(planned, questions, one.name)
    if duel is None or not done.holds(duel):
        return found
    return with_win_rate(found, folder.path / duel.file, planned.graph, duels_of(planned)[one.name])


def _duel_of(planned: PlannedStudy, questions: Questions, name: str) -> Part | None:
    """The part that judges a node's answers, where one is asked for and both nodes have answered."""
    against = duels_of(planned).get(name) if questions.section.win_rate is not None else None
    return None if against is None else judging_part(planned, questions, name, against)


def _kept(path: Path) -> NodeResults | None:
    """Results that are there; damaged ones are written again."""
    try:
        return read_results(path)
    except DataError:
        return None
