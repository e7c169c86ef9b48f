"""What a run tells others of its starts: read back whole, whatever a kill, a full disk or a stranger left there."""

from __future__ import annotations

import json
import random
from pathlib import Path

from megatron.launch.attempts import (
    End,
    Heartbeat,
    Launch,
    Start,
    append_event,
    exit_words,
    read_attempts,
    read_exit,
    read_heartbeat,
    write_heartbeat,
)

JOB = {"id": "17", "restarts": 2}


def told(number: int) -> list[Launch | Start | End]:
    return [
        Launch(number, 10.0 * number, "n1", ["n1", "n2"], 5, 2, JOB),
        Start(number, 10.0 * number + 1, "n1", ["n1", "n2"], 5, 2, "data 2", "torch", JOB, 7, 56, 896),
        End(number, 10.0 * number + 2, 10, "lost", 9, 72, 1152, "main", 1, "n2", ["n2"], 5, JOB),
    ]


def test_what_was_told_is_read_back(tmp_path: Path) -> None:
    for number in (1, 2):
        for one in told(number):
            append_event(tmp_path, one)
    append_event(tmp_path, told(3)[0])
    first, second, third = read_attempts(tmp_path)
    assert [first.launch, first.start, first.end] == told(1) and [second.launch, second.start, second.end] == told(2)
    assert (third.launch, third.start, third.end) == (told(3)[0], None, None)
    assert (third.began, third.job) == (30.0, JOB)
    lines = [json.loads(line) for line in (tmp_path / "attempts.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == [*["launch", "start", "end"] * 2, "launch"]


def test_cut_anywhere_every_whole_line_counts_and_the_next_one_begins_anew(tmp_path: Path) -> None:
    for number in (1, 2):
        for one in told(number):
            append_event(tmp_path, one)
    path = tmp_path / "attempts.jsonl"
    content = path.read_bytes()
    for cut in [0, 1, *random.Random(1).sample(range(len(content)), 40), len(content) - 1]:
        path.write_bytes(content[:cut])
        # A line is known by its JSON, with or without the newline after it.
        lines = content[:cut].split(b"\n")
        whole = sum(line in content.split(b"\n") for line in lines if line)
        assert sum(bool(e) for a in read_attempts(tmp_path) for e in (a.launch, a.start, a.end)) == whole
        append_event(tmp_path, told(9)[2])
        assert read_attempts(tmp_path)[-1].end == told(9)[2]
        assert sum(bool(e) for a in read_attempts(tmp_path) for e in (a.launch, a.start, a.end)) == whole + 1


def test_of_two_ends_the_last_counts(tmp_path: Path) -> None:
    append_event(tmp_path, End(1, 5.0, 75, "SIGTERM"))
    append_event(tmp_path, End(1, 6.0, 10, "lost while it left"))
    assert [attempt.end and attempt.end.code for attempt in read_attempts(tmp_path)] == [10]


def test_what_others_left_there_is_no_error(tmp_path: Path) -> None:
    assert read_attempts(tmp_path) == [] and read_exit(tmp_path) is None and read_heartbeat(tmp_path) is None
    strange = ["[]", "3", '{"event": "end"}', '{"event": "end", "attempt": "1", "time": 2, "code": 3}', "\x00\xff", "{"]
    strange += ['{"event": "fell", "attempt": 1, "time": 2}', '{"event": "launch", "attempt": true, "time": 2}']
    (tmp_path / "attempts.jsonl").write_text("\n".join(strange), encoding="latin-1")
    assert read_attempts(tmp_path) == []
    for name in ("exit.json", "heartbeat.json"):
        for words in strange:
            (tmp_path / name).write_text(words, encoding="latin-1")
            assert read_exit(tmp_path) is None and read_heartbeat(tmp_path) is None
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
    assert read_exit(tmp_path) is None and read_heartbeat(tmp_path) is None


def test_an_exit_record_of_an_older_version_is_read(tmp_path: Path) -> None:
    record = {"code": 75, "reason": "SIGTERM", "step": 7, "consumed_samples": 56, "consumed_tokens": 896}
    (tmp_path / "exit.json").write_text(json.dumps({**record, "training_stage": "a", "time": 3.5, "pid": 4}))
    assert read_exit(tmp_path) == End(0, 3.5, 75, "SIGTERM", 7, 56, 896, "a", pid=4)


def test_nobody_is_named_where_nobody_is_known(tmp_path: Path) -> None:
    end = End(1, 5.0, 75, "SIGTERM: \udcff")
    (tmp_path / "exit.json").write_text(exit_words(end))
    assert read_exit(tmp_path) == end and not {"rank", "host"} & json.loads(exit_words(end)).keys()
    assert json.loads(exit_words(end))["suspects"] == []


def test_a_heartbeat_replaces_the_one_before(tmp_path: Path) -> None:
    for step in (1, 2):
        beat = Heartbeat(5.0, 1, step, 9, "a", "engine", 4.0, "n1", 3, {}, 0.5, None, 16, 144)
        write_heartbeat(tmp_path, beat)
        assert read_heartbeat(tmp_path) == beat
    assert [path.name for path in tmp_path.iterdir()] == ["heartbeat.json"]
