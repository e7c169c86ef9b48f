"""C1 and B1 on disks that are full, read-only or failing: what was saved stays, the message says what to do, the code
is 74, and the run that goes on when there is room equals the undisturbed one."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from kills.full_disks import PAGE, SmallDisk, small_disk
from kills.laws import rows_in, whole_steps
from rank_faults import at
from rank_jobs import start_ranks, train_ranks
from tiny_run import STEPS, curve_of, exit_record, make_run, train, validation_of

from megatron.checkpoint.manager import CheckpointManager, open_checkpoint
from megatron.checkpoint.tensor_shards import whole_shards
from megatron.config.errors import StorageError
from megatron.metrics.sinks import JsonlSink, cut_after

pytestmark = [pytest.mark.timeout(300), pytest.mark.long]
RESUMED_AT = 18


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpora and the run of one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = train(make_run(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk") as made:
        yield made


def half_a_run(undisturbed: Path, disk: SmallDisk) -> Path:
    """The config of the run as if killed after step 18 was saved, on the small disk; its data lie elsewhere."""
    output = disk.path / "run"
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(undisturbed / "run", output)
    for step in range(RESUMED_AT + 1, STEPS + 1):
        shutil.rmtree(output / "checkpoints" / f"step-{step:09d}", ignore_errors=True)
    cut_after(output / "metrics.jsonl", RESUMED_AT)
    (output / "metrics.discarded.jsonl").unlink(missing_ok=True)
    config = undisturbed.parent / f"on-{disk.path.parent.name}.toml"
    text = (undisturbed / "run.toml").read_text()
    config.write_text(text.replace(f'output = "{undisturbed / "run"}"', f'output = "{output}"'))
    return config


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_samples(output: Path, reference: Path) -> None:
    """Of each step."""
    runs = [rows_in(run / "metrics.jsonl") for run in (output, reference)]
    digests = [[(row["step"], row["batch_digest"]) for row in rows if "loss" in row] for rows in runs]
    assert digests[0] == digests[1]


def assert_same_run(output: Path, reference: Path) -> None:
    assert curve_of(output) == curve_of(reference) and validation_of(output) == validation_of(reference)
    final = f"checkpoints/step-{STEPS:09d}/model/model-00000-of-00001-00000.safetensors"
    assert (output / final).read_bytes() == (reference / final).read_bytes()


# One checkpoint


def save(manager: CheckpointManager, step: int, asynchronous: bool) -> None:
    tensors = {f"layers.{number}.weight": torch.full((40, 33), float(step + number)) for number in range(5)}
    manager.save(
        step,
        whole_shards(tensors),
        whole_shards({f"{name}/exp_avg": 2 * tensor for name, tensor in tensors.items()}),
        {"cpu": torch.arange(2000)},
        {"step": step, "words": "x" * 5000},
        {"config.toml": b"y" * 6000, "tokenizer/model": b"z" * 9000},
        asynchronous=asynchronous,
    )
    manager.finish()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_C1_a_disk_that_is_full_at_any_page_of_a_save(disk: SmallDisk, asynchronous: bool) -> None:
    folder = disk.path / "checkpoints"
    manager = CheckpointManager(folder, keep=2)
    save(manager, 1, asynchronous)
    before, refused, files = files_in(folder), 0, set()
    for pages in range(200):
        disk.leave_free(pages)
        try:
            save(manager, 2, asynchronous)
        except StorageError as error:
            words = str(error)
            assert error.exit_code == 74 and "No space left on device" in words
            assert str(folder) in words and "bytes are free)" in words and "free some space" in words, words
            assert files_in(folder) == before and [path.name for path in folder.iterdir()] == ["step-000000001"]
            files.add(words.partition(": cannot")[0].rpartition("/")[2])
            refused += 1
        else:
            break
        finally:
            disk.make_room()
    else:
        raise AssertionError("200 pages did not do")
    assert refused > 20 and {"state.json", "rng.safetensors", "config.toml", "manifest.json"} < files, (refused, files)
    assert open_checkpoint(folder / "step-000000001").step == 1
    found = manager.newest_whole(pytest.fail)
    assert found is not None and found.step == 2 and found.model().whole("layers.4.weight")[0, 0] == 6.0


class FailingCalls:
    """Answers the n-th of all calls by which files of a folder come to be with an error of the operating system."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, at: int, number: int) -> None:
        self.left, self.number, self.folder, self.named = at, number, str(folder), ""
        for name in ("fsync", "rename", "mkdir"):
            patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
        import megatron.checkpoint.storage as storage

        patch.setattr(storage, "open", self._open, raising=False)

    def count(self, what: str) -> None:
        self.left -= 1
        if self.left == 0:
            self.named = what
            raise OSError(self.number, os.strerror(self.number))

    def _wrapped(self, name: str, call: Any) -> Any:
        def counted(first: Any, *words: Any, **more: Any) -> Any:
            if name == "fsync" or self.folder in str(first):
                self.count(name)
            return call(first, *words, **more)

        return counted

    def _open(self, path: Any, mode: str = "r", *words: Any) -> Any:
        file = open(path, mode, *words)  # noqa: SIM115
        if "x" not in mode:
            return file
        outer = self

        class Counted:
            def __enter__(self) -> Counted:
                return self

            def __exit__(self, *error: object) -> None:
                file.close()

            def write(self, data: bytes) -> int:
                outer.count("write")
                return file.write(data)

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

        return Counted()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_C1_an_error_of_any_call_of_a_save(tmp_path: Path, number: int) -> None:
    folder = tmp_path / "checkpoints"
    manager = CheckpointManager(folder, keep=1)
    save(manager, 1, False)
    before, refused, calls = files_in(folder), 0, set()
    for call in range(1, 300):
        with pytest.MonkeyPatch.context() as patch:
            failing = FailingCalls(patch, folder, call, number)
            try:
                save(manager, 2, False)
            except StorageError as error:
                assert error.exit_code == 74 and os.strerror(number) in str(error) and str(folder) in str(error)
            if not failing.named:
                break
        refused += 1
        calls.add(failing.named)
        steps = whole_steps(tmp_path)
        assert max(steps) == 2 or (steps == [1] and files_in(folder) == before), (call, failing.named)
        if max(steps) == 2:  # the error came when it was published, while older ones were deleted
            shutil.rmtree(folder)
            save(manager, 1, False)
            before = files_in(folder)
    assert calls == {"write", "fsync", "rename", "mkdir"} and refused > 25, (refused, calls)
    assert whole_steps(tmp_path) == [2] and not list(folder.glob(".*"))


# A whole run


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_C1_a_run_on_a_disk_that_fills_goes_on_when_there_is_room(
    undisturbed: Path, disk: SmallDisk, asynchronous: bool
) -> None:
    words = ("--set", f"checkpoint.asynchronous={str(asynchronous).lower()}")
    codes, recorded = [], 0
    for pages in (0, 1, 4, 16, 64, 4096):
        disk.make_room()
        config = half_a_run(undisturbed, disk)
        output = disk.path / "run"
        before = files_in(output / "checkpoints")
        disk.leave_free(pages)
        done = train(config, *words)
        codes.append(done.returncode)
        if done.returncode == 0:
            assert_same_run(output, undisturbed / "run")
            continue
        assert done.returncode == 74 and "Traceback" not in done.stderr, done.stderr
        assert f"{output}" in done.stderr and "No space left on device" in done.stderr, done.stderr
        assert "free some space" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
        kept = files_in(output / "checkpoints")
        assert all(kept[name] == content for name, content in before.items()), "old ones are as they were"
        assert max(whole_steps(output)) >= RESUMED_AT
        for line in (output / "metrics.jsonl").read_bytes().splitlines():
            json.loads(line)
        if (output / "exit.json").exists():
            recorded += 1
            assert exit_record(output)["code"] == 74 and "No space left" in exit_record(output)["reason"]
        disk.make_room()
        again = train(config, *words)
        assert again.returncode == 0, again.stderr
        assert f"step-{max(s for s in whole_steps(output) if s < STEPS):09d}" and "damaged" not in again.stdout
        assert_same_run(output, undisturbed / "run")
        assert not [path for path in output.rglob(".*") if path.name != ".lock"]
    assert codes[0] == 74 and codes[-1] == 0 and recorded >= 2, (codes, recorded)


def test_B1_a_disk_that_is_read_only(undisturbed: Path, disk: SmallDisk) -> None:
    config = half_a_run(undisturbed, disk)
    before = files_in(disk.path / "run")
    disk.read_only()
    done = train(config)
    assert done.returncode == 74 and "Read-only file system" in done.stderr, done.stderr
    assert str(disk.path / "run") in done.stderr and "Traceback" not in done.stderr
    disk.read_only(False)
    assert files_in(disk.path / "run") | {".lock": b""} == before | {".lock": b""}
    assert train(config).returncode == 0
    assert_same_run(disk.path / "run", undisturbed / "run")


def test_C1_several_ranks_on_a_disk_that_fills(undisturbed: Path, disk: SmallDisk) -> None:
    config = half_a_run(undisturbed, disk)
    output = disk.path / "run"
    before = files_in(output / "checkpoints")
    disk.leave_free(24)
    job = start_ranks(2, config)
    assert job.wait() == [74, 74], job.text()
    assert "No space left on device" in job.text() and "Traceback" not in job.text(), job.text()
    kept = files_in(output / "checkpoints")
    assert all(kept[name] == content for name, content in before.items())
    assert exit_record(output)["code"] == 74
    disk.make_room()
    train_ranks(2, config)
    assert_same_samples(output, undisturbed / "run")


def _full_for_one(step: int, number: int, victim: int, mine: int) -> None:
    """The victim's disk takes no tensors of the save of a step."""
    if mine != victim:
        return
    from megatron.checkpoint import storage

    write = storage._write

    def refusing(path: Path, pieces: Any) -> Any:
        if f"step-{step:09d}" in str(path) and path.suffix == ".safetensors":
            raise OSError(number, os.strerror(number), str(path))
        return write(path, pieces)

    storage._write = refusing


ONE_RANK = [(0, False), *(pytest.param(*case, marks=pytest.mark.soak) for case in ((1, False), (0, True))), (1, True)]


@pytest.mark.parametrize(("victim", "asynchronous"), ONE_RANK)
def test_C1_a_disk_that_is_full_for_one_rank(
    undisturbed: Path, tmp_path: Path, victim: int, asynchronous: bool
) -> None:
    shutil.copytree(undisturbed / "data", tmp_path / "data")
    config, output = make_run(tmp_path), tmp_path / "run"
    words = ("--set", f"checkpoint.asynchronous={str(asynchronous).lower()}", "--set", "parallel.data_shard='full'")
    job = start_ranks(2, config, *words, fault=partial(_full_for_one, 12, errno.ENOSPC, victim))
    assert job.wait() == [74, 74], job.text()
    told = job.text()
    assert f"rank {victim}: {output}" in told and f"-0000{victim}-of-00002" in told and "No space left" in told, told
    assert "Traceback" not in told and told.count("free some space") == 1, told
    assert exit_record(output)["code"] == 74
    assert max(whole_steps(output)) == 9 and not list((output / "checkpoints").glob(".*"))
    again = train_ranks(2, config, *words)
    assert "step-000000009" in again.log(0)
    assert_same_samples(output, undisturbed / "run")


def _quota() -> None:
    """The kernel lets no file of this process grow beyond 40 kB from now on (`ulimit -f`)."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))


def test_C1_a_quota_of_one_rank(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed / "data", tmp_path / "data")
    config, output = make_run(tmp_path), tmp_path / "run"
    words = ("--set", "parallel.data_shard='full'")
    job = start_ranks(2, config, *words, fault=at(10, 1, _quota))
    assert job.wait() == [74, 74], job.text()
    assert "rank 1: " in job.text() and "File too large" in job.text() and "ulimit -f" in job.text(), job.text()
    assert max(whole_steps(output)) == 9 and exit_record(output)["code"] == 74
    train_ranks(2, config, *words)
    assert_same_samples(output, undisturbed / "run")


# Rows


def test_B1_rows_on_a_disk_that_fills_are_whole_or_absent(disk: SmallDisk) -> None:
    path = disk.path / "metrics.jsonl"
    sink = JsonlSink(path)
    written: list[int] = []
    for pages in (0, 1, 2, 3):
        disk.make_room()
        disk.leave_free(pages)
        refused = 0
        for _ in range(60):
            try:
                sink.write({"step": len(written) + 1, "words": "w" * 700})
                written.append(len(written) + 1)
            except StorageError as error:
                refused += 1
                assert str(path) in str(error) and "No space left" in str(error) and "free some space" in str(error)
        assert refused, "the disk was full"
    disk.make_room()
    sink.write({"step": len(written) + 1})
    sink.close()
    assert [json.loads(line)["step"] for line in path.read_bytes().splitlines()] == [*written, len(written) + 1]


def test_B1_rows_that_cannot_be_set_aside_stay(disk: SmallDisk) -> None:
    path = disk.path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "words": "w" * 500}) + "\n" for step in range(1, 60)))
    before = path.read_bytes()
    for pages in range(20):
        disk.leave_free(pages)
        try:
            moved = cut_after(path, 30)
        except StorageError as error:
            assert str(path) in str(error) and "free some space" in str(error)
            assert path.read_bytes() == before and not (disk.path / ".metrics.jsonl.tmp").exists()
        else:
            assert moved == 29 and pages > 3 and len(path.read_bytes().splitlines()) == 30
            return
        finally:
            disk.make_room()
    raise AssertionError("20 pages did not do")


def test_the_page_of_a_small_disk() -> None:
    assert os.sysconf("SC_PAGE_SIZE") == PAGE
