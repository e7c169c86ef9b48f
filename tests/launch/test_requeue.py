"""The decision whether a job is started again: against simulated histories of attempts, and as a table of ends."""

from __future__ import annotations

import errno
import os
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.config.errors import ConfigError, StorageError
from megatron.launch.attempts import Attempt, End, Launch, Start
from megatron.launch.bad_nodes import (
    BadNodes,
    NodeFailure,
    affordable,
    excluded_hosts,
    read_bad_nodes,
    write_bad_nodes,
)
from megatron.launch.hardware_errors import hardware_error_in
from megatron.launch.requeue_decision import (
    BY_CODE,
    CAUSES,
    STOPS_WITHOUT_PROGRESS,
    Ended,
    Past,
    attempts_without_progress,
    blamed,
    cause_of,
    decide,
)
from megatron.launch.requeue_facts import how_it_ended, obstacle, past_of
from megatron.launch.slurm_control import JobFacts, nodes_of_hosts

DAY = 86400.0
ECC = "RuntimeError: CUDA error: uncorrectable ECC error encountered"


def told(number: int) -> str:
    """What a run records of an operating system's error, as the class of errors for the disk words it."""
    return f"StorageError: {StorageError(f'/runs/a: cannot write: {os.strerror(number)}; see to it')}"


# code, reason, recorded, claimed, cause, requeued (with progress)
ENDS = [
    (0, "complete", True, True, "complete", False),
    (0, "", False, True, "killed", True),  # a launcher that hides that rank 0 was killed
    (0, "", False, False, "complete", False),
    (1, "ValueError: shapes", True, True, "bug", False),
    (1, "", False, True, "killed", True),  # torchrun's code for whatever happened
    (1, "", False, False, "never began", False),
    (1, ECC, True, True, "hardware", True),
    (1, "RuntimeError: CUDA error: an illegal memory access was encountered", True, True, "bug", False),
    (1, "OSError: [Errno 116] Stale file handle", True, True, "disk failing", True),
    (2, "ConfigError: train.x", True, True, "config", False),
    (2, "", False, False, "config", False),
    (3, "", True, True, "data", False),
    (4, "", True, True, "checkpoint", False),
    (5, "", True, True, "changed past", False),
    (6, "UnavailableError: no GPU", True, True, "unavailable", False),
    (6, "UnavailableError: no CUDA-capable device is detected", True, True, "hardware", True),
    (7, "", True, True, "proof", False),
    (8, "", True, True, "non-finite", False),
    (9, "watchdog", True, True, "watchdog", True),
    (10, "lost", True, True, "lost process", True),
    (10, "", False, False, "lost process", True),
    (74, told(errno.ENOSPC), True, True, "disk full", False),
    (74, told(errno.EDQUOT), True, True, "disk full", False),
    (74, told(errno.EFBIG), True, True, "disk full", False),
    (74, told(errno.EROFS), True, True, "storage", False),
    (74, told(errno.EACCES), True, True, "storage", False),
    (74, told(errno.EIO), True, True, "disk failing", True),
    (75, "SIGUSR1", True, True, "asked to stop", True),
    (75, "wall time: 60 s left", True, True, "asked to stop", True),
    (75, "stop-now: asked for by a file", True, True, "stop-now", False),
    (75, "", False, False, "asked to stop", True),  # preprocess_data has no exit.json
    (126, "", False, False, "not runnable", False),
    (127, "", False, False, "not runnable", False),
    (130, "", True, True, "interrupted", False),
    (134, "", False, True, "killed", True),
    (137, "", False, True, "killed", True),
    (139, "", False, True, "killed", True),
    (143, "second signal 15: ended at once", True, True, "killed", True),
    (255, "", False, True, "killed", True),
    (265, "", False, True, "killed", True),
    (271, "", False, True, "killed", True),
    (None, "", False, True, "killed", True),
    (None, "", False, False, "never began", False),
]


@pytest.mark.parametrize("code, reason, recorded, claimed, cause, again", ENDS)
def test_what_follows_from_each_end(
    code: int | None, reason: str, recorded: bool, claimed: bool, cause: str, again: bool
) -> None:
    ended = Ended(code, reason, recorded, claimed)
    assert cause_of(ended) == cause
    decision = decide(ended, Past((0,), (code == 75,), newest=5))
    assert decision.requeue == again
    assert CAUSES[cause].what in decision.why
    if not again and cause != "complete":
        assert CAUSES[cause].remedy in decision.why and CAUSES[cause].remedy
    if not again:
        assert (decision.exit_code == 0) == (cause == "complete")


def test_every_documented_exit_code_has_a_cause(repository: Path) -> None:
    page = (repository / "docs" / "exit-codes.md").read_text(encoding="utf-8")
    codes = {int(line.split("|")[1]) for line in page.splitlines() if line.startswith("|") and line[2].isdigit()}
    assert codes == set(BY_CODE) - {126, 127}
    assert set(BY_CODE.values()) <= set(CAUSES)


@dataclass
class World:
    """A job that starts again whenever it is told to, from its newest checkpoint."""

    newest: int = 0
    positions: list[int | None] = field(default_factory=list)
    stops: list[bool] = field(default_factory=list)

    def attempt(self, code: int, gain: int, begins: bool) -> None:
        self.positions.append(self.newest if begins else None)
        self.stops.append(code == 75)
        self.newest += gain if begins else 0


ends = st.tuples(st.sampled_from([1, 2, 8, 9, 10, 74, 75, 137]), st.sampled_from([0, 0, 0, 7]), st.booleans())


@settings(max_examples=400, deadline=None)
@given(st.lists(ends, max_size=60), st.integers(1, 4))
def test_a_run_goes_on_exactly_while_it_gets_on(history: list[tuple[int, int, bool]], allowed: int) -> None:
    """Counted by hand: failures and stops since the last attempt that led to a later checkpoint."""
    world, failures, stops = World(), 0, 0
    for code, gain, begins in history:
        world.attempt(code, gain, begins)
        failures, stops = (0, 0) if gain and begins else (failures + (code != 75), stops + (code == 75))
        past = Past(tuple(world.positions), tuple(world.stops), world.newest)
        assert attempts_without_progress(past) == (failures, stops)
        decision = decide(Ended(code, "words", recorded=True), past, allowed)
        if code in (1, 2, 8, 74):
            assert not decision.requeue
        elif code == 75:
            assert decision.requeue == (stops < STOPS_WITHOUT_PROGRESS)
        else:
            assert decision.requeue == (failures < allowed and stops < STOPS_WITHOUT_PROGRESS)
        if not decision.requeue:
            break


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5))
def test_what_never_gets_on_comes_to_an_end(seed: int, allowed: int) -> None:
    chance, world = random.Random(seed), World(newest=50)
    for _ in range(allowed + STOPS_WITHOUT_PROGRESS):
        code = chance.choice([9, 10, 75, 137])
        world.attempt(code, 0, chance.random() < 0.5)
        past = Past(tuple(world.positions), tuple(world.stops), world.newest)
        if not decide(Ended(code, recorded=True), past, allowed).requeue:
            return
    raise AssertionError("goes on for ever")


def test_restarts_of_one_job_are_bounded_where_asked() -> None:
    past = Past((0, 10), (True, True), newest=20, requeues=1)
    assert decide(Ended(75, "SIGTERM", True), past).requeue
    assert decide(Ended(75, "SIGTERM", True), past, max_requeues=2).requeue
    refused = decide(Ended(75, "SIGTERM", True), past, max_requeues=1)
    assert not refused.requeue and "--max-requeues" in refused.why and refused.exit_code == 75


def job(number: str, restarts: int = 0) -> dict[str, object]:
    return {"id": number, **({"restarts": restarts} if restarts else {})}


def attempt(number: int, of: dict[str, object], end: int | None = None, step: int | None = 0) -> Attempt:
    start = None if step is None else Start(number, 2.0, job=of, step=step)
    return Attempt(number, Launch(number, 1.0, job=of), start, None if end is None else End(number, 3.0, end, job=of))


def test_only_a_record_of_this_very_attempt_counts() -> None:
    now, before = job("7", 1), job("7")
    old = End(1, 3.0, 75, "SIGTERM", job=before)
    # this start of the job died before it opened the folder, in which the record of the start before it lies
    ended, mine = how_it_ended([attempt(1, before, 75)], old, now, 2)
    assert (ended.code, ended.recorded, ended.claimed, mine) == (2, False, False, None)
    # it opened the folder (which removes the record), and was killed
    ended, mine = how_it_ended([attempt(1, before, 75), attempt(2, now)], None, now, 137)
    assert (ended.code, ended.recorded, ended.claimed) == (137, False, True) and mine is not None
    # a record of the attempt before that lies there all the same
    assert how_it_ended([attempt(1, before, 75), attempt(2, now)], old, now, 137)[0].code == 137
    # its own record is believed before what srun made of it
    own = End(2, 3.0, 75, "SIGTERM", job=now)
    assert how_it_ended([attempt(1, before, 75), attempt(2, now)], own, now, 137)[0].code == 75
    # exit.json is torn, attempts.jsonl has the end
    assert how_it_ended([attempt(1, before, 75), attempt(2, now, 9)], None, now, 137)[0].code == 9
    # outside SLURM, or where a container hides its variables, the last attempt is meant
    assert how_it_ended([attempt(1, {}, 9)], None, now, None)[0].code == 9
    assert how_it_ended([attempt(1, before, 9)], None, {}, None)[0].code == 9
    # a folder of an older version
    assert how_it_ended([], End(0, 3.0, 75), now, 1)[0].code == 75


def test_starts_that_left_no_trace_are_counted() -> None:
    """SLURM counts restarts; those that were killed before they opened the folder are nowhere else."""
    attempts = [attempt(1, job("7"), 75, 10)]
    assert past_of(attempts, job("7", 3), 20) == Past((10, None, None, None), (True, False, False, False), 20, 3)
    assert past_of(attempts, job("7"), 20).positions == (10,)
    assert past_of(attempts, job("8"), 20).positions == (10, None)
    assert past_of(attempts, {}, 20).positions == (10,)
    assert past_of([attempt(1, {}, 75, 10)], job("7", 3), 20).positions == (10,)  # a container hides the variables


def facts(**over: object) -> JobFacts:
    known: dict[str, object] = {"state": "RUNNING", "restarts": 0, "nodes": 2, "partitions": ("a",), "excluded": ""}
    known |= {"required": "", "seconds": 100.0, "limit": 3600.0, "preempted": False, "may_requeue": True}
    return JobFacts(**{**known, **over})  # type: ignore[arg-type]


def test_what_slurm_says_of_the_job() -> None:
    assert obstacle(facts(), 0) == (False, "")
    assert obstacle(facts(restarts=1, state="COMPLETING"), 0) == (True, "")  # scontrol requeue by an operator
    assert obstacle(facts(state="PENDING"), 0) == (True, "")
    assert "cancelled" in obstacle(facts(state="COMPLETING"), 0)[1]
    assert "cancelled" in obstacle(facts(state="CANCELLED"), 0)[1]
    assert obstacle(facts(state="COMPLETING", seconds=3597.0), 0) == (False, "")  # the time limit
    assert obstacle(facts(state="COMPLETING", preempted=True), 0) == (False, "")
    assert "--no-requeue" in obstacle(facts(may_requeue=False), 0)[1]


def test_hosts_are_blamed_for_what_is_theirs_alone() -> None:
    def hosts(code: int, reason: str, host: str = "n1", suspects: tuple[str, ...] = ()) -> tuple[str, ...]:
        return blamed(Ended(code, reason, True, True, host, suspects))

    assert hosts(10, "lost", "n1", ("n3", "n2")) == ("n2", "n3")
    assert hosts(10, "lost; seen here: NCCL error: remote process exited or there was a network error") == ()
    assert hosts(9, "watchdog") == ()
    assert hosts(9, f"watchdog after {ECC}") == ("n1",)
    assert hosts(1, ECC) == ("n1",)
    assert hosts(1, "NCCL error in: x.cpp, unhandled system error") == ()
    assert hosts(74, told(errno.EIO)) == ("n1",)
    assert hosts(74, told(errno.ENOSPC)) == ()
    assert hosts(2, ECC, "n1", ("n2",)) == ()
    assert hosts(75, "SIGTERM", "n1", ("n2",)) == ()


@pytest.mark.parametrize(
    "reason, at_once",
    [
        (ECC, True),
        ("NVRM: Xid (PCI:0000:01:00): 48, pid=7, DBE", True),
        ("NVRM: Xid (PCI:0000:48:00): 79, pid=7, GPU has fallen off the bus.", True),
        ("NVRM: Xid (PCI:0000:48:00): 13, pid=7", None),
        ("NVRM: Xid (PCI:0000:48:00): 31, pid=7", None),
        ("Xid 119", False),
        ("CUDA error: uncorrectable NVLink error detected during the execution", False),
        ("NCCL error in: f.cpp:1, unhandled system error, NCCL version 2.21", False),
        ("NCCL error in: f.cpp:1, invalid usage", None),
        ("CUDA out of memory. Tried to allocate 48.00 GiB", None),
        ("CUDA error: device-side assert triggered", None),
        ("a step of 48 rows", None),
    ],
)
def test_words_about_machines(reason: str, at_once: bool | None) -> None:
    """The messages as drivers and libraries print them."""
    found = hardware_error_in(reason)
    assert (found.at_once if found else None) == at_once


failures = st.builds(
    NodeFailure, st.floats(0, 30 * DAY), st.integers(1, 50), st.just(9), st.just("words"), st.booleans()
)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcde"), st.lists(failures, min_size=1, max_size=4), max_size=5),
    st.integers(1, 3),
    st.floats(1, 40),
)
def test_exclusion_by_its_words(known: dict[str, list[NodeFailure]], after: int, days: float) -> None:
    """Excluded is whoever has `after` failures that are young enough, or one that is enough; and until that is over."""
    now = 30 * DAY
    nodes = BadNodes({host: sorted(found, key=lambda one: one.time) for host, found in known.items()})
    nodes.forget(now, days)
    young = {host: [one for one in found if now - one.time < days * DAY] for host, found in known.items()}
    bad = {host for host, found in young.items() if len(found) >= after or any(one.at_once for one in found)}
    assert set(nodes.excluded(after)) == bad
    for host, about in nodes.to_json(after, days)["excluded"].items():
        until = about["until"]
        for when, expected in ((until - 1, True), (until + 1, False)):
            left = [one for one in young[host] if when - one.time < days * DAY]
            assert (len(left) >= after or any(one.at_once for one in left)) == expected


def test_a_failure_of_one_attempt_counts_once_and_files_come_back(tmp_path: Path) -> None:
    nodes = BadNodes()
    for _ in range(3):
        nodes.note("a", NodeFailure(1000.0, 4, 9, "words"))
    assert nodes.excluded() == []
    nodes.note("a", NodeFailure(2000.0, 5, 9, "words"))
    nodes.note("b", NodeFailure(1500.0, 5, 1, ECC, True))
    nodes.given["7"] = ["a"]
    write_bad_nodes(tmp_path, nodes)
    assert read_bad_nodes(tmp_path) == nodes
    assert excluded_hosts(tmp_path, now=3000.0) == ["b", "a"]
    assert excluded_hosts(tmp_path, now=1000.0 + 7 * DAY + 1) == ["b"]
    assert excluded_hosts(tmp_path, now=1500.0 + 7 * DAY + 1) == []
    nodes.forgive("b")
    assert nodes.excluded() == ["a"]
    with pytest.raises(ConfigError, match="--forgive c: nothing is known against it; hosts with failures: a"):
        nodes.forgive("c")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"suspected": {"a": 3}}', '{"suspected": {"a": [{"time": "x"}]}}'])
def test_B1_a_damaged_list_of_nodes_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "bad_nodes.json").write_text(content)
    for read in (read_bad_nodes, excluded_hosts):
        with pytest.raises(ConfigError, match=r"bad_nodes\.json: not a list of bad nodes.*mend it, or remove it"):
            read(tmp_path)


def test_no_file_no_bad_nodes(tmp_path: Path) -> None:
    assert excluded_hosts(tmp_path) == [] and read_bad_nodes(tmp_path) == BadNodes()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 12), unique=True), st.sets(st.integers(0, 9)), st.integers(1, 8), st.sets(st.integers(0, 3))
)
def test_enough_nodes_are_always_left(wanted: list[int], usable: set[int], needed: int, required: set[int]) -> None:
    def names(numbers: list[int] | set[int]) -> list[str]:
        return [f"n{number}" for number in numbers]

    taken = affordable(names(wanted), names(usable), needed, names(required))
    left = set(names(usable)) - set(taken)
    assert not set(taken) & set(names(required))
    assert len(left) >= min(needed, len(usable))
    # as many as can be, the first ones first
    spared = [host for host in names(wanted) if host not in taken and host not in names(required)]
    assert not spared or len(left) <= needed
    assert all(host in names(usable) for host in spared)


def test_nodes_are_found_by_either_name() -> None:
    nodes = {"gpu1": "gpu1", "r2n3": "gpu-a.cluster", "x1": "vm", "x2": "vm"}
    assert nodes_of_hosts(["gpu1.cluster", "gpu-a", "vm", "nobody"], nodes) == (["gpu1", "r2n3"], ["vm", "nobody"])
