"""Jobs of a study: what waits for what, against a simulated queue; what SLURM knows already; what sbatch is told."""

from __future__ import annotations

import heapq
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from megatron.commands.study_slurm import after_words
from megatron.launch.run_queue import ListedJob
from megatron.study.slurm_nodes import (
    REPORT,
    JobKey,
    JobPlan,
    NeededJob,
    Wanted,
    comment_of,
    living_jobs,
    note_job,
    plan_jobs,
)

# -- a queue that does what sbatch's manual says -----------------------------------------------------------------------


class Simulated:
    """Jobs begin as soon as what they wait for is there. lasts: seconds by key; fails: keys that end badly."""

    def __init__(self, lasts: Mapping[JobKey, float], fails: set[JobKey]) -> None:
        self._lasts, self._fails = lasts, fails
        self.spans: dict[JobKey, tuple[float, float]] = {}
        self.cancelled: set[JobKey] = set()

    def run(self, jobs: Sequence[NeededJob]) -> Simulated:
        waiting, ends, now = list(jobs), [], 0.0
        while True:
            moved = True
            while moved:
                moved = False
                for job in list(waiting):
                    over = {key for key, (_, end) in self.spans.items() if end <= now} | self.cancelled
                    bad = (self._fails & over) | self.cancelled
                    if set(job.ok) & bad:
                        self.cancelled.add(job.key)
                    elif set(job.ok) | set(job.ended) <= over:
                        self.spans[job.key] = (now, now + self._lasts[job.key])
                        heapq.heappush(ends, now + self._lasts[job.key])
                    else:
                        continue
                    waiting.remove(job)
                    moved = True
            if not ends:
                assert not waiting, f"they wait for ever: {waiting}"
                return self
            now = heapq.heappop(ends)

    def most_at_once(self, task: str) -> int:
        spans = [span for key, span in self.spans.items() if key[1] == task]
        return max((sum(begin <= start < end for begin, end in spans) for start, _ in spans), default=0)


def some_nodes(seed: int, count: int = 14) -> dict[str, Wanted]:
    """A study as a random graph: trees with averages between."""
    draw = random.Random(seed)
    nodes: dict[str, Wanted] = {}
    for number in range(count):
        names = list(nodes)
        average = len(names) > 2 and draw.random() < 0.2
        parents = draw.sample(names, 2 if average else min(len(names), draw.random() < 0.8))
        nodes[f"n{number}"] = Wanted(
            f"n{number}",
            "average" if average else "train",
            tuple(parents),
            0 if average else draw.randrange(1, 9),
            done=False,
            evaluate=draw.random() < 0.5,
        )
    return nodes


def behind(nodes: Mapping[str, Wanted], names: set[str]) -> set[str]:
    """Nodes and all that goes on from them."""
    found = set(names)
    for name, node in nodes.items():  # parents come first
        if found & set(node.parents):
            found.add(name)
    return found


def lasting(seed: int, plan: JobPlan) -> dict[JobKey, float]:
    draw = random.Random(seed)
    return {job.key: draw.uniform(0.5, 20) for job in plan.jobs}


@pytest.mark.parametrize("seed", range(30))
def test_nothing_begins_too_early_and_all_of_it_ends(seed: int) -> None:
    nodes = some_nodes(seed)
    at_once = random.Random(seed).choice([None, 1, 2, 3])
    plan = plan_jobs(nodes, {}, at_once)
    queue = Simulated(lasting(seed, plan), set()).run(plan.jobs)
    assert not queue.cancelled
    for name, node in nodes.items():
        begin = queue.spans[(name, node.task)][0]
        assert all(queue.spans[(one, nodes[one].task)][1] <= begin for one in node.parents)
        assert ((name, "evaluate") in queue.spans) == node.evaluate
        if node.evaluate:
            assert queue.spans[(name, "evaluate")][0] >= queue.spans[(name, node.task)][1]
    last = max(end for key, (_, end) in queue.spans.items() if key != REPORT)
    assert queue.spans[REPORT][0] >= last
    assert at_once is None or queue.most_at_once("train") <= at_once
    keys = [job.key for job in plan.jobs]
    assert len(keys) == len(set(keys))
    for place, job in enumerate(plan.jobs):  # sbatch must know them
        assert {*job.ok, *job.ended} <= set(keys[:place])


@pytest.mark.parametrize("seed", range(30))
def test_a_failure_takes_its_descendants_and_nothing_else(seed: int) -> None:
    nodes, draw = some_nodes(seed), random.Random(seed)
    plan = plan_jobs(nodes, {}, draw.choice([None, 1, 2]))
    bad = set(draw.sample(sorted(nodes), 2))
    queue = Simulated(lasting(seed, plan), {(name, nodes[name].task) for name in bad}).run(plan.jobs)
    lost = behind(nodes, bad)
    made = {key[0] for key in queue.spans if key[1] in ("train", "average")} - bad
    assert made == set(nodes) - lost
    # first failures alone have begun; what fails behind another failure never begins
    assert {key[0] for key in queue.cancelled} <= lost
    evaluated = {key[0] for key in queue.spans if key[1] == "evaluate"}
    assert evaluated == {name for name, node in nodes.items() if node.evaluate and name not in lost}
    assert REPORT in queue.spans


@pytest.mark.parametrize("seed", range(30))
def test_submitting_again_at_any_moment_completes_it_without_doubles(seed: int) -> None:
    """Killed after any number of calls, the next one submits the rest; and one row follows on the other."""
    nodes, draw = some_nodes(seed), random.Random(seed)
    at_once = draw.choice([None, 1, 2])
    first = plan_jobs(nodes, {}, at_once)
    cut = draw.randrange(len(first.jobs) + 1)
    numbers = {job.key: str(number) for number, job in enumerate(first.jobs, 100)}
    living = {
        job.key: ListedJob(numbers[job.key], "PENDING", "Dependency", tuple(numbers[k] for k in (*job.ok, *job.ended)))
        for job in first.jobs[:cut]
    }
    second = plan_jobs(nodes, living, at_once)
    stale = {job.id for job in second.stale}
    kept = [job for job in first.jobs[:cut] if job.key in second.kept]
    assert stale == {numbers[job.key] for job in first.jobs[:cut]} - {numbers[job.key] for job in kept}
    assert stale <= {numbers[REPORT]}  # which did not wait for the rest
    together = [*kept, *second.jobs]
    assert sorted(job.key for job in together) == sorted(job.key for job in first.jobs)
    queue = Simulated(lasting(seed, first), set()).run(together)
    assert not queue.cancelled and set(queue.spans) == {job.key for job in first.jobs}
    assert at_once is None or queue.most_at_once("train") <= at_once
    again = plan_jobs(nodes, {job.key: ListedJob(numbers[job.key], "RUNNING") for job in first.jobs}, at_once)
    assert not again.jobs and not again.stale


def chain() -> dict[str, Wanted]:
    return {
        "trunk": Wanted("trunk", "train", (), 5, False, False),
        "branch": Wanted("branch", "train", ("trunk",), 5, False, True),
    }


def test_a_child_of_a_job_that_failed_is_replaced() -> None:
    """SLURM is about to cancel it, or, without kill_invalid_depend, never would."""
    old = {("branch", "train"): ListedJob("7", "PENDING", "DependencyNeverSatisfied", ("6",)),
           ("branch", "evaluate"): ListedJob("8", "PENDING", "Dependency", ("7",))}  # fmt: skip
    plan = plan_jobs(chain(), old)  # type: ignore[arg-type]
    assert {job.id for job in plan.stale} == {"7", "8"} and not plan.kept
    assert [job.key for job in plan.jobs] == [("trunk", "train"), ("branch", "train"), ("branch", "evaluate"), REPORT]
    waits = {("branch", "train"): ListedJob("7", "PENDING", "Dependency", ("6",))}
    assert [job.id for job in plan_jobs(chain(), waits).stale] == ["7"]  # type: ignore[arg-type]
    runs = {("trunk", "train"): ListedJob("6", "RUNNING"), **waits}
    plan = plan_jobs(chain(), runs)  # type: ignore[arg-type]
    assert not plan.stale and [job.key for job in plan.jobs] == [("branch", "evaluate"), REPORT]


def test_a_node_that_is_done_is_waited_for_by_nobody() -> None:
    nodes = {**chain(), "trunk": Wanted("trunk", "train", (), 5, True, True)}
    plan = plan_jobs(nodes, {})
    assert [(job.key, job.ok) for job in plan.jobs] == [
        (("trunk", "evaluate"), ()),
        (("branch", "train"), ()),
        (("branch", "evaluate"), (("branch", "train"),)),
        (REPORT, ()),
    ]
    done = {name: Wanted(name, "train", node.parents, 5, True, False) for name, node in nodes.items()}
    assert not plan_jobs(done, {}).jobs


def test_what_sbatch_is_told_to_wait_for() -> None:
    ids: dict[JobKey, str] = {("a", "train"): "1", ("b", "train"): "2", ("c", "train"): "3"}
    job = NeededJob(("d", "average"), (("a", "train"), ("b", "train")), (("c", "train"),))
    assert after_words(job, ids, "afterok:99") == "afterok:1:2,afterany:3"
    assert after_words(NeededJob(("a", "train")), ids, "afterok:99") == "afterok:99"
    assert after_words(NeededJob(("a", "train")), ids, None) == ""


# -- jobs that are there -----------------------------------------------------------------------------------------------


def test_jobs_are_known_by_their_comment_and_else_by_the_record(tmp_path: Path) -> None:
    mine, other = tmp_path / "a b|c", tmp_path / "other"
    mine.mkdir()
    train: JobKey = ("aa11", "train")
    jobs = [
        ListedJob("1", "RUNNING", comment=comment_of(train, mine)),
        ListedJob("2", "PENDING", comment=comment_of(train, other)),
        ListedJob("3", "PENDING", comment=comment_of(REPORT, mine, "ours: nightly")),
        ListedJob("4", "PENDING", comment="something else"),
        ListedJob("5", "PENDING"),
    ]
    assert {key: job.id for key, job in living_jobs(mine, jobs).items()} == {train: "1", REPORT: "3"}
    (tmp_path / "alias").symlink_to(mine)
    assert living_jobs(tmp_path / "alias", jobs).keys() == {train, REPORT}
    note_job(mine, ("bb22", "evaluate"), "5", [], Path("x"))  # a site that takes comments away
    note_job(mine, ("cc33", "evaluate"), "2", [], Path("x"))  # a number of another study's job now
    assert set(living_jobs(mine, jobs)) == {train, REPORT, ("bb22", "evaluate")}
