"""Whatever stops preprocessing, the same command goes on to the same bytes. Real processes, real signals."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from preprocessing.corpora import byte_ids, digests, read_indexed, texts_of, write_jsonl

from megatron.config.errors import ConfigError, DataError, StorageError
from megatron.preprocessing import parts as parts_module
from megatron.preprocessing.block_queue import Progress
from megatron.preprocessing.options import PreprocessOptions
from megatron.preprocessing.parts import PartKey, open_part, whole_parts
from megatron.preprocessing.run import preprocess
from megatron.preprocessing.storage import storage_errors

TEXTS = texts_of(2, 1500)
OPTIONS = PreprocessOptions(block_bytes=8000)

SCRIPT = """\
import sys, time
from megatron.commands.frame import run_command
from megatron.preprocessing.options import PreprocessOptions
from megatron.preprocessing.run import preprocess
from megatron.preprocessing.storage import storage_errors

def main(argv):
    corpus, prefix, workers, pause = sys.argv[1:]
    show = lambda now: time.sleep(float(pause))
    options = PreprocessOptions(block_bytes=8000)
    outcome = preprocess([corpus], prefix, "bytes", workers=int(workers), options=options, progress=show)
    print("made", outcome.parts_made, "kept", outcome.parts_kept)
    return 0

if __name__ == "__main__":
    sys.exit(run_command(main))
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "run.py").write_text(SCRIPT)
    return write_jsonl(tmp_path / "corpus.jsonl", TEXTS)


@pytest.fixture
def expected(tmp_path: Path, corpus: Path) -> dict[str, str]:
    preprocess([corpus], tmp_path / "whole", "bytes", options=OPTIONS)
    assert read_indexed(tmp_path / "whole") == [byte_ids(text) for text in TEXTS if text.strip()]
    return digests(tmp_path / "whole")


@contextmanager
def running(corpus: Path, workers: int, pause: float = 0.0) -> Iterator[subprocess.Popen[str]]:
    """The run as a process, in a group of its own as a terminal has it."""
    command = [sys.executable, str(corpus.parent / "run.py"), str(corpus), str(corpus.parent / "p"), str(workers)]
    with subprocess.Popen(
        [*command, str(pause)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def finish(corpus: Path) -> str:
    with running(corpus, 2) as process:
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output


def wait_for_parts(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while whole_parts(folder) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def children_of(pid: int) -> list[int]:
    """The spawned workers of a process; not the resource tracker of multiprocessing."""
    listing = Path(f"/proc/{pid}/task/{pid}/children")
    children = [int(child) for child in listing.read_text().split()] if listing.exists() else []
    return [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def assert_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while not all(map(is_gone, pids)):
        assert time.monotonic() < deadline, "a worker outlived its run"
        time.sleep(0.02)


def kill_and_resume(corpus: Path, expected: dict[str, str], seed: int) -> None:
    """kill -9 at a random moment, several times over, then let it finish."""
    draw = random.Random(seed)
    for _ in range(3):
        with running(corpus, draw.choice([1, 2, 3]), pause=0.01) as process:
            time.sleep(draw.uniform(0.2, 3.0))
            workers = children_of(process.pid)
            process.kill()
            process.wait(30)
        assert_gone(workers)
        if (corpus.parent / "p.idx").exists():
            break
    else:
        finish(corpus)
    assert digests(corpus.parent / "p") == expected


@pytest.mark.parametrize("seed", [1, 2])
def test_a_killed_run_goes_on_to_the_same_bytes(corpus: Path, expected: dict[str, str], seed: int) -> None:
    kill_and_resume(corpus, expected, seed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10, 20))
def test_killed_at_ten_random_moments(corpus: Path, expected: dict[str, str], seed: int) -> None:
    kill_and_resume(corpus, expected, seed)


def test_parts_of_a_killed_run_are_kept(corpus: Path, expected: dict[str, str]) -> None:
    folder = corpus.parent / "p.parts"
    with running(corpus, 2, pause=0.05) as process:
        wait_for_parts(folder, 5, process)
        process.kill()
        process.wait(30)
    kept = whole_parts(folder)
    made, _, kept_words = finish(corpus).partition(" kept ")
    assert int(kept_words) == kept >= 5 and int(made.split()[1]) > 0
    assert digests(corpus.parent / "p") == expected and not folder.exists()


def test_a_dead_worker_ends_the_run_with_words(corpus: Path, expected: dict[str, str]) -> None:
    folder = corpus.parent / "p.parts"
    with running(corpus, 2, pause=0.05) as process:
        wait_for_parts(folder, 3, process)
        os.kill(children_of(process.pid)[0], signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 6
    assert "a worker process died" in errors and "fewer --workers" in errors and "Traceback" not in errors
    assert f"run the same command again: {whole_parts(folder)} finished parts are kept" in errors
    finish(corpus)
    assert digests(corpus.parent / "p") == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal_stops_cleanly(corpus: Path, expected: dict[str, str], number: signal.Signals, workers: int) -> None:
    folder = corpus.parent / "p.parts"
    with running(corpus, workers, pause=0.05) as process:
        wait_for_parts(folder, 3, process)
        children = children_of(process.pid)
        os.killpg(process.pid, number)  # as a terminal and a scheduler do: the workers get it too
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert f"stopped by {number.name}: run the same command again" in errors and "Traceback" not in errors
    assert_gone(children)
    assert not list(folder.glob("*.partial")) or workers > 1
    finish(corpus)
    assert digests(corpus.parent / "p") == expected


def test_another_process_on_the_same_work_is_refused(corpus: Path, expected: dict[str, str]) -> None:
    with running(corpus, 1, pause=0.2) as process:
        wait_for_parts(corpus.parent / "p.parts", 2, process)
        with pytest.raises(DataError, match="another process is making these parts now"):
            preprocess([corpus], corpus.parent / "p", "bytes", options=OPTIONS)
        with pytest.raises(ConfigError, match="stop it first"):
            preprocess([corpus], corpus.parent / "p", "bytes", options=OPTIONS, restart=True)
        os.kill(process.pid, signal.SIGTERM)
        process.communicate(timeout=60)
    finish(corpus)
    assert digests(corpus.parent / "p") == expected


class Stop(Exception):
    pass


def stopped_after(corpus: Path, parts: int, prefix: str = "p") -> Path:
    """The folder of a run that ended in an error after some parts."""

    def show(now: Progress) -> None:
        seen.append(now)
        if len(seen) == parts:
            raise Stop

    seen: list[Progress] = []
    with pytest.raises(Stop):
        preprocess([corpus], corpus.parent / prefix, "bytes", options=OPTIONS, progress=show)
    return corpus.parent / f"{prefix}.parts"


def test_changed_input_or_options_are_refused_and_named(corpus: Path, expected: dict[str, str]) -> None:
    prefix, folder = corpus.parent / "p", stopped_after(corpus, 4)
    kept = whole_parts(folder)
    content, times = corpus.read_bytes(), corpus.stat()
    for change, words in (
        (content + b"\n", rf"corpus.jsonl: {len(content)} bytes became {len(content) + 1}"),
        (content.replace(b"return", b"RETURN", 1), r"corpus.jsonl: it was written to since"),
    ):
        corpus.write_bytes(change)
        with pytest.raises(ConfigError, match=rf"{words}.*--restart"):
            preprocess([corpus], prefix, "bytes", options=OPTIONS)
    corpus.write_bytes(content)
    os.utime(corpus, ns=(times.st_atime_ns, times.st_mtime_ns))
    other = PreprocessOptions(OPTIONS.read.__class__(id_field="name"), block_bytes=8000)
    with pytest.raises(ConfigError, match=r'options.read.id_field: "id" became "name".*--restart'):
        preprocess([corpus], prefix, "bytes", options=other)
    outcome = preprocess([corpus], prefix, "bytes", options=OPTIONS)
    assert outcome.parts_kept == kept and digests(prefix) == expected


def test_restart_throws_the_parts_away(corpus: Path) -> None:
    stopped_after(corpus, 4)
    corpus.write_text('{"text": "new"}\n')
    outcome = preprocess([corpus], corpus.parent / "p", "bytes", options=OPTIONS, restart=True)
    assert outcome.parts_kept == 0 and read_indexed(corpus.parent / "p") == [byte_ids("new")]


def test_a_bad_record_can_be_quarantined_without_losing_the_parts(corpus: Path) -> None:
    corpus.write_text(corpus.read_text() + "{\n")
    with pytest.raises(DataError, match="line 1501"):
        preprocess([corpus], corpus.parent / "p", "bytes", options=OPTIONS)
    options = PreprocessOptions(on_error="quarantine", block_bytes=8000)
    outcome = preprocess([corpus], corpus.parent / "p", "bytes", options=options)
    assert outcome.parts_made == 1 and outcome.parts_kept > 10
    assert len((corpus.parent / "p.quarantine.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("place", ["ids", "lengths", "summary"])
def test_a_damaged_part_is_found_and_made_anew(corpus: Path, expected: dict[str, str], place: str) -> None:
    folder = stopped_after(corpus, 4)
    part = open_part(folder, PartKey(0, 1))
    assert part is not None
    content = bytearray(part.path.read_bytes())
    offset = len(content) - 40 if place == "summary" else part.summary["sections"][place]["offset"]
    content[offset] ^= 1
    part.path.write_bytes(content)
    if place != "summary":  # only what is read shows it: the merge
        with pytest.raises(DataError, match=r"b000001.part: the part was damaged.*again"):
            preprocess([corpus], corpus.parent / "p", "bytes", options=OPTIONS)
        assert not (corpus.parent / "p.bin").exists()
    preprocess([corpus], corpus.parent / "p", "bytes", options=OPTIONS)
    assert digests(corpus.parent / "p") == expected


def test_a_full_disk_keeps_the_parts(corpus: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = parts_module.PartWriter.add_ids, []

    def full(self: parts_module.PartWriter, ids: object) -> None:
        calls.append(ids)
        if len(calls) == 7:
            with storage_errors(self._partial):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, ids)  # type: ignore[arg-type]

    monkeypatch.setattr(parts_module.PartWriter, "add_ids", full)
    with pytest.raises(StorageError, match="No space left.*free some space.*7 finished parts are kept"):
        preprocess([corpus], corpus.parent / "p", "bytes", options=OPTIONS)
    assert not list((corpus.parent / "p.parts").glob("*.partial"))
    assert preprocess([corpus], corpus.parent / "p", "bytes", options=OPTIONS).parts_kept == 7
    assert digests(corpus.parent / "p") == expected


def test_a_limit_on_file_size_in_the_merge_is_exit_74(corpus: Path, expected: dict[str, str]) -> None:
    """A real failing write: the parts fit below the limit of the process, the .bin does not."""
    command = [sys.executable, str(corpus.parent / "run.py"), str(corpus), str(corpus.parent / "p"), "1", "0"]
    limit = (corpus.parent / "whole.bin").stat().st_size // 2
    process = subprocess.run(
        command,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 74 and "File too large" in process.stderr and "are kept" in process.stderr
    assert not list(corpus.parent.glob("p.bin*"))
    assert " kept 0" not in finish(corpus)
    assert digests(corpus.parent / "p") == expected


def test_killed_while_publishing_is_not_an_existing_output(corpus: Path, expected: dict[str, str]) -> None:
    prefix = corpus.parent / "p"
    preprocess([corpus], prefix, "bytes", options=OPTIONS, keep_parts=True)
    (corpus.parent / "p.idx").unlink()  # .bin and .json are renamed first, .idx last
    preprocess([corpus], prefix, "bytes", options=OPTIONS)
    assert digests(prefix) == expected


def test_shards_at_the_same_time(corpus: Path, stagemix_command: list[str]) -> None:
    """As a SLURM array runs them: all begin together, in a folder that none of them has made yet."""
    prefix = corpus.parent / "p"
    words = [*stagemix_command, "preprocess_data", "--input", str(corpus), "--tokenizer", "bytes", "--workers", "1"]
    processes = [
        subprocess.Popen(
            [*words, "--output-prefix", str(prefix), "--shard", f"{number}/3"], stderr=subprocess.PIPE, text=True
        )
        for number in (1, 2, 3)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    merged = [*stagemix_command, "merge_data", "--output-prefix", str(prefix)]
    subprocess.run(merged, check=True, timeout=60, stdout=subprocess.DEVNULL)
    assert read_indexed(prefix) == [byte_ids(text) for text in TEXTS if text.strip()]
