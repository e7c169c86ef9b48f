"""Law C2 for foreign files: nothing in a pickle is ever run, and what it says is bounded by its own bytes."""

from __future__ import annotations

import argparse
import builtins
import io
import os
import pickle
import resource
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.config.errors import CheckpointError, ConfigError
from megatron.foreign.checkpoint import open_foreign
from megatron.foreign.inert_pickle import InertPickle, Stub
from megatron.foreign.torch_file import TensorRecord, TorchFile, flat_tensors, namespace, require_allowed


class Calls:
    """An object that a plain unpickler makes by calling something."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.how = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.how


class SetState:
    def __init__(self, state: Any) -> None:
        self.state = state

    def __reduce__(self) -> tuple[Any, ...]:
        return Path, ("x",), self.state


def zipped(path: Path, pickled: bytes, storages: dict[str, bytes] | None = None, **more: bytes) -> Path:
    """An archive as torch.save lays it out, around these bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for key, raw in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", raw)
        for name, raw in more.items():
            archive.writestr(name, raw)
    return path


def tensor_words(
    dtype: str, key: str, count: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
) -> bytes:
    """A pickle of one tensor, written instruction by instruction."""

    def number(value: int) -> bytes:
        return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    sizes = b"(" + b"".join(map(number, shape)) + b"t(" + b"".join(map(number, stride)) + b"t"
    storage = b"(" + text("storage") + f"ctorch\n{dtype}\n".encode() + text(key) + text("cpu") + number(count) + b"tQ"
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + sizes + hooks + b"tR."


@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "stream"])
def test_what_torch_saves_is_what_is_read(zip_format: bool, tmp_path: Path) -> None:
    shared = torch.randn(6, 4)
    tensors = {
        "plain": torch.randn(3, 5),
        "view": shared[1:5, 1:3],
        "transposed": shared.t(),
        "bf16": torch.randn(7).bfloat16(),
        "half": torch.randn(2, 2, 2).half(),
        "double": torch.randn(1).double(),
        "ints": torch.arange(5),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    others = {
        "args": argparse.Namespace(lr=1e-4, dtype=torch.bfloat16, names=["a", None], nested={"x": (1, -(2**40))}),
        "number": 2**70,
        "text": "Grüße \U0001f642",
        "raw": b"\x00\xff",
        "set": {1, 2},
        "size": torch.Size([1, 2]),
        "numpy": np.random.default_rng(0),
    }
    path = tmp_path / "file.pt"
    state = OrderedDict(tensors)
    state._metadata = {"version": 1}  # type: ignore[attr-defined]
    torch.save({"state": state, **others}, path, _use_new_zipfile_serialization=zip_format)
    with TorchFile(path) as file:
        file.verify()
        records = dict(flat_tensors("", file.content["state"]))
        assert records.keys() == tensors.keys()
        for name, tensor in tensors.items():
            record = records[name]
            found = file.read(name, record, (0,) * len(record.shape), record.shape)
            assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
        assert torch.equal(file.read("view", records["view"], (1, 1), (2, 1)), shared[2:4, 2:3])
        args = namespace(file.content["args"])
        assert (
            args is not None
            and args["lr"] == 1e-4
            and args["names"] == ["a", None]
            and args["nested"]["x"] == (1, -(2**40))
        )
        assert isinstance(args["dtype"], Stub) and repr(args["dtype"]) == "torch.bfloat16"
        for name in ("number", "text", "size"):
            assert file.content[name] == others[name]
        for name in ("raw", "set", "numpy"):  # by calls of functions of Python and NumPy
            assert isinstance(file.content[name], Stub)


def test_large_and_strided_tensors_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.foreign.torch_file._CHUNK", 64)
    whole = torch.randn(11, 13, 7)
    for number, tensor in enumerate(
        (whole, whole.permute(2, 0, 1), whole[::2, 3:, ::3], whole.t() if whole.dim() == 2 else whole)
    ):
        torch.save({"t": tensor}, tmp_path / f"{number}.pt")
        with TorchFile(tmp_path / f"{number}.pt") as file:
            record = file.content["t"]
            assert torch.equal(file.read("t", record, (0, 0, 0), record.shape), tensor)
            assert torch.equal(file.read("t", record, (1, 2, 0), (3, 4, 2)), tensor[1:4, 2:6, :2])


def hostile(canary: Path) -> dict[str, Any]:
    """Objects that a plain unpickler turns into code that makes the canary file."""
    touch = f"open({str(canary)!r}, 'w')"
    return {
        "os.system": Calls(os.system, f"touch {canary}"),
        "builtins.eval": Calls(eval, touch),
        "builtins.exec": Calls(exec, touch),
        "pathlib.touch": Calls(Path.touch, canary),
        "getattr": Calls(getattr, Calls(__import__, "os"), "system"),
        "in args": {"args": argparse.Namespace(lr=Calls(os.system, f"touch {canary}")), "model": {}},
        "in optimizer states": {"model": {}, "optimizer": {"state": {0: {"step": Calls(eval, touch)}}}},
        "as a state": SetState({"x": Calls(eval, touch)}),
        "as a key": {"model": {Calls(eval, touch): 1}},
        "in a tensor's place": {"model": {"weight": Calls(torch.load, str(canary))}},
    }


@pytest.mark.parametrize("kind", list(hostile(Path("x"))))
def test_C2_a_payload_is_never_executed(kind: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    payload = hostile(canary)[kind]
    for protocol in (2, 3, 4, 5):
        pickled = pickle.dumps(payload, protocol)
        try:
            with TorchFile(zipped(tmp_path / "file.pt", pickled)) as file:
                list(flat_tensors("", file.content))
        except CheckpointError:
            pass
        assert not canary.exists()
    # the payload is one: a plain unpickler runs it
    if kind in ("os.system", "builtins.eval", "in args"):
        pickle.loads(pickled)
        assert canary.exists()


def test_C2_whole_checkpoints_with_payloads_run_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    rank = tmp_path / "iter_0000001" / "mp_rank_00"
    rank.mkdir(parents=True)
    for payload in hostile(canary).values():
        torch.save(payload, rank / "model_optim_rng.pt")
        with pytest.raises((CheckpointError, ConfigError)):
            open_foreign(tmp_path, pickles_allowed=True)
        assert not canary.exists()


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02cos\nsystem\n(X\x04\x00\x00\x00truetR.",
        b"\x80\x02(X\x04\x00\x00\x00trueios\nsystem\n.",  # INST, of protocol 0
        b"\x80\x02(cos\nsystem\nX\x04\x00\x00\x00trueo.",  # OBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",  # STACK_GLOBAL
        b"\x80\x02cbuiltins\neval\n\x8c\x011\x85\x81.",  # NEWOBJ
        b"\x80\x04cbuiltins\neval\n\x8c\x011\x85}\x92.",  # NEWOBJ_EX
        b"\x80\x02\x82\x01.",  # EXT1, from copyreg's registry
        b"\x80\x02X\x04\x00\x00\x00evilQ.",  # a persistent id of no storage
        b"\x80\x02(X\x07\x00\x00\x00storagecos\nsystem\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ.",
        b"\x80\x02cos\nsystem\nq\x00X\x04\x00\x00\x00trueq\x01h\x00h\x01\x85R.",  # by way of the memo
        b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R}X\x01\x00\x00\x00xcos\nsystem\nsb.",  # BUILD with a name
    ],
)
def test_C2_every_way_to_call_gives_a_stub_or_an_error(
    pickled: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def called(*arguments: Any, **names: Any) -> None:
        raise AssertionError("something of the file was called")

    monkeypatch.setattr(os, "system", called)
    path = zipped(tmp_path / "file.pt", pickled)
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "eval", called)
        try:
            with TorchFile(path) as file:
                assert isinstance(file.content, Stub)
        except CheckpointError as error:
            assert str(path) in str(error)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize(
    "pickled",
    {
        "a text of 4 GB": b"\x80\x02X\xff\xff\xff\xff.",
        "bytes of 2^60": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b".",
        "a buffer of 2^60": b"\x80\x05\x96" + struct.pack("<Q", 2**60) + b".",
        "a number of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7f.",
        "a number of -1 bytes": b"\x80\x02\x8b\xff\xff\xff\xff.",
        "a frame of 2^62": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
        "the memo at 2^32 - 1": b"\x80\x02Nr\xff\xff\xff\xffj\xff\xff\xff\xff.",
        "a memo that is not there": b"\x80\x02h\x07.",
        "no end": b"\x80\x02}" + b"N0" * 1000,
        "an empty stack": b"\x80\x020.",
        "no mark": b"\x80\x02NNt.",
        "a name without end": b"\x80\x02c" + b"a" * 5000,
        "a deep tuple as a key": b"\x80\x02}" + b"N" + b"\x85" * 50_000 + b"Ns.",
        "a list as a key": b"\x80\x02}]Ns.",
        "a call of a number": b"\x80\x02K\x01)R.",
        "a dictionary of one": b"\x80\x02}(K\x01u.",
    }.values(),
)
def test_huge_counts_and_broken_instructions_are_refused_within_their_own_bytes(pickled: bytes, tmp_path: Path) -> None:
    before = peak()
    try:
        with TorchFile(zipped(tmp_path / "file.pt", pickled)) as file:
            list(flat_tensors("", file.content))
    except CheckpointError as error:
        assert "file.pt" in str(error)
    assert peak() - before < 200e6


def test_containers_that_hold_each_other_over_and_over_cost_no_more_than_they_are(tmp_path: Path) -> None:
    """A billion laughs: 60 dictionaries, each twice in the next, are 2^60 paths."""
    content: dict[str, Any] = {"weight": torch.ones(1)}
    for _ in range(60):
        content = {"a": content, "b": content}
    torch.save({"model": content}, tmp_path / "file.pt")
    with TorchFile(tmp_path / "file.pt") as file, pytest.raises(CheckpointError, match="lies in two places"):
        list(flat_tensors("file", file.content["model"]))
    loop: dict[str, Any] = {"weight": torch.ones(1)}
    loop["itself"] = loop
    torch.save({"model": loop}, tmp_path / "loop.pt")
    with TorchFile(tmp_path / "loop.pt") as file, pytest.raises(CheckpointError, match="lies in two places"):
        list(flat_tensors("file", file.content["model"]))


def test_depth_ends_no_process(tmp_path: Path) -> None:
    deep = b"\x80\x02N" + b"\x85" * 100_000 + b"."
    with TorchFile(zipped(tmp_path / "deep.pt", deep)) as file:
        assert isinstance(file.content, tuple)
    stubs = b"\x80\x02" + b"cx\ny\n" * 50_000 + b"b" * 49_999 + b"."  # each the state of the one before
    with TorchFile(zipped(tmp_path / "stub.pt", stubs)) as file:
        assert repr(file.content) == "x.y"


def test_objects_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.foreign.inert_pickle.MOST_OBJECTS", 1000)
    with pytest.raises(CheckpointError, match="more than 1000 objects"):
        InertPickle(b"\x80\x02" + b"\x8f" * 2000 + b".", "here", {}, lambda pid: None).read()
    monkeypatch.setattr("megatron.foreign.inert_pickle.MOST_BYTES", 100)
    with pytest.raises(CheckpointError, match="more than 100 bytes"):
        InertPickle(b"\x80\x02" + b"N0" * 2000 + b".", "here", {}, lambda pid: None).read()


def test_a_storage_shorter_than_its_tensor(tmp_path: Path) -> None:
    for shape, stride, offset in (
        ((4, 4), (4, 1), 0),
        ((3, 4), (4, 1), 1),
        ((2**30, 2**30), (2**30, 1), 0),
        ((3,), (6,), 0),
    ):
        words = tensor_words("FloatStorage", "0", 12, offset, shape, stride)
        with TorchFile(zipped(tmp_path / "short.pt", words, {"0": bytes(48)})) as file:
            record = file.content
            assert isinstance(record, TensorRecord)
            with pytest.raises(
                CheckpointError, match=r"short\.pt: tensor w of \[.*needs \d+ bytes of storage 0, which has 48"
            ):
                file.read("w", record, (0,) * len(shape), shape)
    with (
        TorchFile(zipped(tmp_path / "gone.pt", words, {"1": bytes(48)})) as file,
        pytest.raises(CheckpointError, match="storage 0 is missing"),
    ):
        file.read("w", file.content, (0,), (3,))


@pytest.mark.parametrize(("shape", "stride"), [((2**40,), (0,)), ((4, 4), (1, 1)), ((2, 3), (2, 1)), ((5, 2), (1, 0))])
def test_strides_that_overlap(shape: tuple[int, ...], stride: tuple[int, ...], tmp_path: Path) -> None:
    words = tensor_words("FloatStorage", "0", 12, 0, shape, stride)
    with (
        TorchFile(zipped(tmp_path / "file.pt", words, {"0": bytes(48)})) as file,
        pytest.raises(CheckpointError, match="lie upon each other"),
    ):
        file.read("w", file.content, (0,) * len(shape), shape)


@pytest.mark.parametrize(("shape", "stride"), [((-1,), (1,)), ((2,), (-1,)), ((2**40, 2**40), (1, 1)), ((2,), (1, 1))])
def test_sizes_that_cannot_be(shape: tuple[int, ...], stride: tuple[int, ...], tmp_path: Path) -> None:
    words = tensor_words("FloatStorage", "0", 12, 0, shape, stride)
    with pytest.raises(CheckpointError, match="not a pickle of plain data"):
        TorchFile(zipped(tmp_path / "file.pt", words, {"0": bytes(48)}))


@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "stream"])
def test_truncated_files_are_named_wherever_they_are_cut(zip_format: bool, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"model": {"w": torch.randn(40, 40)}}, buffer, _use_new_zipfile_serialization=zip_format)
    raw, path = buffer.getvalue(), tmp_path / "cut.pt"
    for end in (0, 1, 3, 10, 40, len(raw) // 3, len(raw) // 2, len(raw) - 200, len(raw) - 23, len(raw) - 1):
        path.write_bytes(raw[:end])
        with pytest.raises(CheckpointError, match=r"cut\.pt"):
            TorchFile(path)


def test_a_changed_byte_is_found_by_its_checksum(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"w": torch.zeros(5000)}, path)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with TorchFile(path) as file, pytest.raises(CheckpointError, match=r"file\.pt: data/0: expected CRC-32"):
        file.verify()


@pytest.mark.parametrize("name", ["archive/../../canary", "/etc/passwd", "other/data.pkl", "archive//x", "archive\\x"])
def test_paths_that_lead_out_of_the_archive(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="leads out of it"):
        TorchFile(zipped(tmp_path / "file.pt", b"\x80\x02N.", {}, **{name: b"x"}))
    assert [path.name for path in tmp_path.iterdir()] == ["file.pt"]


def test_archives_that_torch_does_not_write(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02N." + b" " * 1000)
    with pytest.raises(CheckpointError, match="compressed"):
        TorchFile(path)
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data.pkl", b"\x80\x02N.")
        archive.writestr("archive/data.pkl", b"\x80\x02K\x01.")
    with pytest.raises(CheckpointError, match="twice"):
        TorchFile(path)
    with pytest.raises(CheckpointError, match="big"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02N.")
            archive.writestr("archive/byteorder", "big")
        TorchFile(path)
    for content in (b"PK\x03\x04 and no more", b"{}", b"\x80\x02N.", pickle.dumps({"a": 1}, 4)):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"file\.pt"):
            TorchFile(path)


def test_nothing_is_read_without_permission(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--allow-pickle"):
        require_allowed(False, tmp_path)
    rank = tmp_path / "iter_0000001" / "mp_rank_00"
    rank.mkdir(parents=True)
    (rank / "model_optim_rng.pt").write_bytes(b"not even a file of torch")
    with pytest.raises(ConfigError, match="--allow-pickle"):
        open_foreign(tmp_path, pickles_allowed=False)
