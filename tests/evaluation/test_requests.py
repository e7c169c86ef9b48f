"""Requests for evaluations: one server has each, none is lost with its server, and no result is taken for another's."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import ranks  # noqa: F401 (its import tells the fork server what to load)
from trainer.stand_in import StandIn

from megatron.config.evaluation_section import EvaluationSection
from megatron.evaluation.requests import STALE_SECONDS, EvaluationBox, Request
from megatron.evaluation.side_run import Outcome, carry_out
from megatron.launch.side_process import side_environment

_forked = multiprocessing.get_context("forkserver")
RECORD = {"format": 2, "tasks": {}, "models": [{"name": "m", "results": {}}]}


@pytest.fixture
def box(tmp_path: Path) -> EvaluationBox:
    """Of a run with one request, for step 3."""
    made = EvaluationBox(tmp_path / "run")
    checkpoint = made.checkpoint_path(3)
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text('{"step": 3}')
    made.ask(request())
    return made


def request(**changes: str) -> Request:
    wants = EvaluationSection(tasks=["quiz"]).model_dump(mode="json")
    return Request(3, "balanced", 24, 384, changes.get("checkpoint", "abc"), ".", wants)


def test_one_of_many_servers_has_a_request(box: EvaluationBox) -> None:
    together, won = threading.Barrier(16), []

    def serve() -> None:
        mine = EvaluationBox(box.output)
        together.wait(10)
        won.append(mine.claim(request()))

    threads = [threading.Thread(target=serve) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(won) == 16 and sum(claim is not None for claim in won) == 1


def test_what_a_killed_server_had_is_taken_up_at_once(
    box: EvaluationBox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = StandIn(tmp_path, "time.sleep(600)")
    server = _forked.Process(target=_serve, args=(box.output, stand_in), daemon=True)
    server.start()
    end = time.monotonic() + 60
    while not stand_in.steps:
        assert time.monotonic() < end and server.is_alive()
        time.sleep(0.02)
    assert box.claim(request()) is None, "it lives"
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    server.join(10)
    stand_in.use(monkeypatch).becomes("")
    found = carry_out(box, request(), EvaluationSection(tasks=["quiz"]), lambda: False)
    assert found is not None and found.code == 0 and list(box.results()) == [3]
    assert not list(box.requests.iterdir()) and not list(box.working.iterdir())


def _serve(output: Path, stand_in: StandIn) -> None:
    stand_in(0)
    carry_out(EvaluationBox(output), request(), EvaluationSection(tasks=["quiz"]), lambda: False)


def _claim_of_another_host(box: EvaluationBox, age: float, number: int = 1, words: str | None = None) -> Path:
    path = box.requests / f"step-000000003.claim-{number:04d}"
    content = {"host": "elsewhere", "namespace": "", "pid": 1, "started": "1", "by_run": False}
    path.write_text(json.dumps(content) if words is None else words)
    os.utime(path, (time.time() - age, time.time() - age))
    return path


@pytest.mark.parametrize("words", [None, ""])
def test_a_server_of_another_host_is_trusted_while_it_touches_its_claim(box: EvaluationBox, words: str | None) -> None:
    path = _claim_of_another_host(box, 10, words=words)
    assert box.claim(request()) is None
    os.utime(path, (time.time() - 2 * STALE_SECONDS,) * 2)
    taken = box.claim(request())
    assert taken is not None and taken.number == 2


def test_a_server_that_was_only_slow_does_not_publish_over_its_successor(box: EvaluationBox) -> None:
    slow = box.claim(request())
    assert slow is not None and slow.stands()
    _claim_of_another_host(box, 0, number=2)
    assert not slow.stands() and not slow.publish(RECORD) and not slow.fail(1, "why", [])
    assert not slow.beat(seconds=0)
    assert box.results() == {} and box.pending() == [request()]


def test_a_result_is_of_the_checkpoint_that_was_asked_about(box: EvaluationBox) -> None:
    taken = box.claim(request())
    assert taken is not None
    box.ask(request(checkpoint="another of the same step"))
    assert not taken.publish(RECORD) and box.results() == {}
    taken.release()
    assert box.claim(request()) is None, "nobody asks for that one any more"
    again = box.claim(request(checkpoint="another of the same step"))
    assert again is not None and again.publish(RECORD)
    assert box.results()[3]["evaluated"]["checkpoint"] == "another of the same step"


def test_what_kills_its_servers_is_not_tried_for_ever(box: EvaluationBox) -> None:
    for number in (1, 2, 3):
        _claim_of_another_host(box, 2 * STALE_SECONDS, number)
    assert box.claim(request()) is None
    failure = box.failure(3)
    assert failure is not None and "too little memory" in failure["reason"] and failure["again"] is False
    assert box.pending() == [] and box.claims("step-000000003") == []


def test_the_run_itself_waits_for_no_claim_of_its_earlier_process(box: EvaluationBox) -> None:
    path = _claim_of_another_host(box, 0)
    path.write_text(path.read_text().replace('"by_run": false', '"by_run": true'))
    assert box.claim(request()) is None
    assert EvaluationBox(box.output, by_run=True).claim(request()) is not None


def test_B1_what_is_no_request_is_named_and_passed_over(box: EvaluationBox) -> None:
    said: list[str] = []
    for number, words in ((4, "{"), (5, "[]"), (6, '{"format": 9}'), (7, '{"format": 1, "step": "7"}')):
        box.request_path(number).write_text(words)
    assert box.pending(said.append) == [request()]
    assert len(said) == 4 and all("remove the file" in words for words in said)
    box.result_path(5).write_text('{"format": 2, "models": []}')
    assert box.results(said.append) == {} and "step-000000005.json" in said[-1]


def test_an_evaluation_that_hangs_is_ended(box: EvaluationBox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    StandIn(tmp_path, "time.sleep(600)").use(monkeypatch)
    found = carry_out(box, request(), EvaluationSection(tasks=["quiz"], seconds=1), lambda: False)
    assert isinstance(found, Outcome) and found.code == 124 and "evaluation.seconds" in found.reason


def test_a_side_process_is_nobodys_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE")
    for name in launched:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    found = side_environment(tmp_path, threads=2)
    assert not set(launched) & set(found)
    assert (found["CUDA_VISIBLE_DEVICES"], found["OMP_NUM_THREADS"], found["TMPDIR"]) == ("3", "2", str(tmp_path))
