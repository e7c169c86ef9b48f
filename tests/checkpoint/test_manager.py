"""Laws C1 (whole or absent) and C2 (no pickle), against the file system itself: killed processes, flipped bits,
full disks. What a checkpoint holds is compared with the tensors that went in."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import shutil
import signal
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.manager import CheckpointManager, open_checkpoint
from megatron.checkpoint.manifest import Seal
from megatron.checkpoint.storage import Storage, Tensors
from megatron.checkpoint.tensor_shards import whole_shards
from megatron.config.errors import CheckpointError, StorageError

STORAGE_METHODS = ("make_folder", "write_bytes", "write_tensors", "copy_file", "sync_folder", "rename", "remove_folder")


def tensors_of(step: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(7, 5, generator=generator)
    return {
        "model": {"a.weight": weight, "b.bias": torch.randn(3, generator=generator).to(torch.bfloat16)},
        "optimizer": {"a.weight/exp_avg": weight.double() * 2, "a.weight/step": torch.tensor(float(step))},
        "rng": {"torch": torch.arange(step, step + 16, dtype=torch.uint8)},
    }


def save(manager: CheckpointManager, step: int, keep_forever: bool = False, retire: bool = True) -> Path:
    parts = tensors_of(step)
    extra: dict[str, bytes | Path] = {"config.toml": b"[run]\n", "tokenizer/tokenizer.model": Path(__file__)}
    state = {"format": 1, "step": step, "data": {"n": step}}
    return manager.save(
        step,
        whole_shards(parts["model"]),
        whole_shards(parts["optimizer"]),
        parts["rng"],
        state,
        extra,
        keep_forever=keep_forever,
        retire=retire,
    )


def assert_holds(found: object, step: int) -> None:
    assert found is not None
    parts = tensors_of(step)
    assert found.step == step and found.state["data"] == {"n": step}  # type: ignore[attr-defined]
    for part, read in (("model", found.model), ("optimizer", found.optimizer), ("rng", found.rng)):  # type: ignore[attr-defined]
        tensors = read() if part == "rng" else read().all()
        assert tensors.keys() == parts[part].keys()
        for name, tensor in parts[part].items():
            assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)


def silent(_: str) -> None:
    raise AssertionError("nothing should have been reported")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_what_is_saved_is_what_is_found(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "checkpoints", keep=3)
    assert manager.newest_whole(silent) is None
    for step in (1, 2, 10):
        save(manager, step)
    assert_holds(manager.newest_whole(silent), 10)
    assert_holds(open_checkpoint(tmp_path / "checkpoints" / "step-000000002"), 2)


def test_views_and_shared_memory_are_saved_whole(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    model = {"transposed": base.t(), "row": base[1], "same": base[1], "all": base}
    CheckpointManager(tmp_path).save(1, whole_shards(model), {}, {"torch": torch.zeros(1)}, {"step": 1})
    found = open_checkpoint(tmp_path / "step-000000001").model().all()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.items())


def test_torch_distributed_checkpoint_reads_the_same_files(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    path = save(CheckpointManager(tmp_path), 3)
    expected = tensors_of(3)["optimizer"]
    found = {name: torch.full_like(tensor, -1) for name, tensor in expected.items()}
    dcp.load(found, storage_reader=HuggingFaceStorageReader(str(path / "optimizer")), no_dist=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_C1_one_flipped_bit_in_any_file_is_found(tmp_path: Path, where: str) -> None:
    manager = CheckpointManager(tmp_path)
    save(manager, 1)
    path = save(manager, 2)
    names = list(files_of(path))
    assert {"manifest.json", "state.json", "config.toml", "rng.safetensors"} < set(names) and len(names) == 7
    for name in names:
        original = (path / name).read_bytes()
        position = {"first": 0, "middle": len(original) // 2, "last": len(original) - 1}[where]
        for bit in (0, 7):
            broken = bytearray(original)
            broken[position] ^= 1 << bit
            (path / name).write_bytes(broken)
            with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as error:
                open_checkpoint(path)
            assert "expected" in str(error.value) and "found" in str(error.value)
        reports: list[str] = []
        assert_holds(manager.newest_whole(reports.append), 1)
        assert len(reports) == 1 and str(path / name) in reports[0]
        (path / name).write_bytes(original)
    assert_holds(manager.newest_whole(silent), 2)


def test_C1_every_single_bit_of_the_manifest_counts(tmp_path: Path) -> None:
    path = save(CheckpointManager(tmp_path), 1)
    original = (path / "manifest.json").read_bytes()
    for position in range(0, len(original), 3):
        broken = bytearray(original)
        broken[position] ^= 1 << (position % 8)
        (path / "manifest.json").write_bytes(broken)
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def test_C1_missing_truncated_and_stray_files_are_found(tmp_path: Path) -> None:
    path = save(CheckpointManager(tmp_path / "run"), 1)
    for name in files_of(path):
        for damage in (Path.unlink, lambda file: os.truncate(file, file.stat().st_size - 1)):
            copy = tmp_path / "copy"
            shutil.copytree(path, copy)
            damage(copy / name)
            with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
                open_checkpoint(copy)
            shutil.rmtree(copy)
    shutil.copy(path / "rng.safetensors", path / "model" / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        open_checkpoint(path)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        open_checkpoint(tmp_path / "nowhere")


def test_C1_all_damaged_is_an_error_and_never_step_zero(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    for step in (1, 2):
        (save(manager, step) / "state.json").write_text("{}")
    reports: list[str] = []
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints is whole") as error:
        manager.newest_whole(reports.append)
    assert error.value.exit_code == 4 and len(reports) == 2


class KillingStorage(Storage):
    """Kills its own process with SIGKILL at the n-th file operation: before, amid or after it."""

    def __init__(self, at: int, when: str) -> None:
        self.at, self.when, self.count = at, when, 0

    def __getattribute__(self, name: str) -> object:
        method = object.__getattribute__(self, name)
        if name not in STORAGE_METHODS:
            return method

        def counted(*arguments: object) -> object:
            self.count += 1
            if self.count == self.at and self.when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.count == self.at and self.when == "amid":
                self._half(name, method, arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            result = method(*arguments)
            if self.count == self.at and self.when == "after":
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return counted

    def _half(self, name: str, method: Callable[..., object], arguments: tuple[object, ...]) -> None:
        """Leaves what a torn operation leaves: half of a file's bytes, or half of a folder's entries deleted."""
        target = Path(str(arguments[-1] if name == "copy_file" else arguments[0]))
        if name in ("write_bytes", "write_tensors", "copy_file"):
            method(*arguments)
            os.truncate(target, target.stat().st_size // 2)
        elif name == "remove_folder":
            for path in [path for path in sorted(target.rglob("*")) if path.is_file()][::2]:
                path.unlink()


def in_child(action: Callable[[], None]) -> int:
    """Runs `action` in a forked process; gives its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("when", ["before", "amid", "after"])
def test_C1_kill_at_every_file_operation_of_a_save(tmp_path: Path, when: str) -> None:
    killed = 0
    for at in range(1, 200):
        folder = tmp_path / str(at)
        for step in (1, 2):
            save(CheckpointManager(folder, keep=2), step)
        before = {step: files_of(folder / f"step-00000000{step}") for step in (1, 2)}
        code = in_child(lambda: save(CheckpointManager(folder, keep=2, storage=KillingStorage(at, when)), 3))  # noqa: B023
        newest = CheckpointManager(folder, keep=2).newest_whole(silent)
        assert newest is not None and newest.step in (2, 3)
        assert_holds(newest, newest.step)
        assert files_of(folder / "step-000000002") == before[2]
        if newest.step == 2:
            assert files_of(folder / "step-000000001") == before[1]
        save(CheckpointManager(folder, keep=2), 4)
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        assert_holds(CheckpointManager(folder, keep=2).newest_whole(silent), 4)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        killed += 1
    assert killed >= 15 and code == 0


class FailingStorage(Storage):
    """Answers the n-th write with an I/O error of the operating system."""

    def __init__(self, at: int, number: int) -> None:
        self.left, self.number = at, number

    def write_bytes(self, path: Path, data: bytes) -> Seal:
        self._count(path)
        return super().write_bytes(path, data)

    def write_tensors(self, path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Seal:
        self._count(path)
        return super().write_tensors(path, tensors, metadata)

    def _count(self, path: Path) -> None:
        from megatron.checkpoint.storage import io_errors

        self.left -= 1
        if self.left == 0:
            with io_errors(path, "write"):
                raise OSError(self.number, os.strerror(self.number), str(path))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 6])
def test_C1_an_io_error_while_saving_leaves_the_old_ones_intact(tmp_path: Path, at: int, number: int) -> None:
    save(CheckpointManager(tmp_path), 1)
    before = files_of(tmp_path)
    with pytest.raises(StorageError, match=os.strerror(number)) as error:
        save(CheckpointManager(tmp_path, storage=FailingStorage(at, number)), 2)
    assert error.value.exit_code == 74 and "step-000000002" in str(error.value)
    assert files_of(tmp_path) == before
    assert_holds(CheckpointManager(tmp_path).newest_whole(silent), 1)


@pytest.mark.parametrize("limit", [100, 400, 5000])
def test_B1_a_file_that_may_not_grow_is_a_storage_error(tmp_path: Path, limit: int) -> None:
    """The real thing: the kernel refuses to let any file of the process grow beyond the limit."""
    save(CheckpointManager(tmp_path), 1)
    before = files_of(tmp_path)
    message = tmp_path.parent / f"message-{limit}"

    def limited() -> None:
        parts = tensors_of(2)
        parts["model"]["big"] = torch.zeros(4000)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        descriptor = os.open(message, os.O_WRONLY | os.O_CREAT)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            CheckpointManager(tmp_path).save(2, whole_shards(parts["model"]), {}, parts["rng"], {"step": 2})
        except StorageError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            os.write(descriptor, str(error).encode())
            os._exit(error.exit_code)

    assert in_child(limited) == 74
    assert "File too large" in message.read_text() and str(tmp_path) in message.read_text()
    assert files_of(tmp_path) == before


def test_retention_keeps_the_newest_and_those_at_stage_ends(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=2)
    for step in range(1, 8):
        save(manager, step, keep_forever=step in (2, 5))
    assert [step for step, _ in manager.steps()] == [2, 5, 6, 7]
    save(manager, 8, retire=False)
    assert [step for step, _ in manager.steps()] == [2, 5, 6, 7, 8]


def test_C1_retention_never_trades_a_whole_one_for_a_damaged_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(CheckpointManager(tmp_path, keep=3), step)
    for step in (2, 3):
        (tmp_path / f"step-00000000{step}" / "rng.safetensors").write_bytes(b"")
    manager = CheckpointManager(tmp_path, keep=1)
    assert_holds(manager.newest_whole(lambda _: None), 1)
    save(manager, 2)
    assert [step for step, _ in manager.steps()] == [2, 3]
    assert len(list((tmp_path / "discarded").iterdir())) == 1
    assert_holds(open_checkpoint(tmp_path / "step-000000002"), 2)


class Trap:
    """Unpickling this object writes a file: proof that someone unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (os.mkdir, (str(self.path),))


def test_C2_a_pickle_in_place_of_any_file_is_never_read(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "run")
    path = save(manager, 1)
    sprung = tmp_path / "sprung"
    for name in files_of(path):
        original = (path / name).read_bytes()
        (path / name).write_bytes(pickle.dumps(Trap(sprung)))
        with pytest.raises(CheckpointError):
            open_checkpoint(path)
        (path / name).write_bytes(original)
    assert not sprung.exists()


def test_C2_no_module_of_the_checkpoint_package_can_unpickle() -> None:
    import megatron.checkpoint.manager

    for path in Path(megatron.checkpoint.manager.__file__).parent.glob("*.py"):
        source = path.read_text()
        assert "import pickle" not in source and "torch.load" not in source and "allow_pickle" not in source


def test_B1_a_manifest_that_points_outside_is_refused(tmp_path: Path) -> None:
    from megatron.checkpoint.manifest import manifest_bytes, read_manifest

    path = save(CheckpointManager(tmp_path), 1)
    manifest = read_manifest(path)
    manifest["files"]["../secret"] = {"bytes": 1, "sha256": "0"}
    (path / "manifest.json").write_bytes(manifest_bytes(manifest))
    with pytest.raises(CheckpointError, match="inside the checkpoint"):
        open_checkpoint(path)
