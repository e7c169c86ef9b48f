"""A checkpoint of weights alone, without optimizer state, written tensor by tensor: of imported models and of averages.

What it lacks of a run's checkpoint begins anew with the training stage that goes on from it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.aside import made_aside, publish, remove, would_replace
from megatron.checkpoint.finite import check_finite
from megatron.checkpoint.manifest import NAME, Seal, build_manifest, manifest_bytes
from megatron.checkpoint.shard_files import FILE_BYTES
from megatron.checkpoint.storage import Storage
from megatron.checkpoint.tensor_files import lay_out, raw_bytes
from megatron.checkpoint.tensor_shards import TensorSource
from megatron.config.errors import ConfigError

_CHUNK = 8 * 2**20
_RNG = "rng.safetensors"
Pieces = Iterable[bytes | memoryview]


def write_weights_alone(
    output: Path,
    source: TensorSource,
    step: int,
    state: Callable[[], Mapping[str, Any]],
    files: Mapping[str, bytes | Path],
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    before: Callable[[Path], None] = lambda aside: None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes the checkpoint `output` aside, fsyncs it, and publishes it by one rename (law C1). It is kept for good.

    source: weights by our names, whole tensors in any number of boxes. They are read once, a few MB at a time, in a
    thread of its own.
    state: gives state.json as JSON values; asked when the weights are written. files: path in the checkpoint -> bytes,
    or a file to copy; without rng.safetensors there are no random states in it.
    dtype: of the weights in the checkpoint; None: each tensor's own. before: given the folder aside before anything is
    written in it. progress: told bytes written, and of how many.
    Returns `output`. Raises ConfigError where `output` is in use or exists (an older checkpoint is replaced with
    `overwrite`), CheckpointError for values that are not finite, or not in `dtype`, StorageError.
    """
    output = Path(output)
    storage = Storage()
    with made_aside(output) as aside:
        check_free(output, overwrite)
        remove(aside)
        before(aside)
        try:
            for folder in ("", "model", *sorted({Path(name).parent.as_posix() for name in files} - {"."})):
                storage.make_folder(aside / folder)
            seals = _write_weights(storage, aside, source, dtype, progress or (lambda done, whole: None))
            words = (json.dumps(dict(state()), indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()
            seals["state.json"] = storage.write_bytes(aside / "state.json", words)
            if _RNG not in files:
                seals[_RNG] = storage.write_tensors(aside / _RNG, {})
            for name, content in files.items():
                if isinstance(content, bytes):
                    seals[name] = storage.write_bytes(aside / name, content)
                else:
                    seals[name] = storage.copy_file(content, aside / name)
            manifest = build_manifest(aside, step, True, seals)
            storage.write_bytes(aside / NAME, manifest_bytes(manifest))
            publish(aside, output)
        except BaseException:
            # half of it is of no use: it begins anew
            remove(aside)
            raise
    return output


def check_free(output: Path, overwrite: bool) -> None:
    """Raises ConfigError where `output` holds something that must not be replaced."""
    if not would_replace(output, overwrite):
        return
    if not (output / NAME).is_file():
        raise ConfigError(f"{output}: is not a checkpoint (no {NAME}), so it is not overwritten")


def _write_weights(
    storage: Storage,
    aside: Path,
    source: TensorSource,
    dtype: torch.dtype | None,
    progress: Callable[[int, int], None],
) -> dict[str, Seal]:
    """The files of model/, each at most FILE_BYTES unless one tensor is larger, and their seals."""
    files: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
    total = size = 0
    for name in sorted(source.names()):
        tensor = (name, dtype or source.dtype(name), tuple(source.shape(name)))
        bytes_here = prod(tensor[2]) * tensor[1].itemsize
        if files[-1] and size + bytes_here > FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += bytes_here
        total += bytes_here
    seals: dict[str, Seal] = {}
    done = 0

    def counted(pieces: Pieces) -> Iterator[bytes | memoryview]:
        nonlocal done
        for piece in pieces:
            yield piece
            done += len(piece)
            progress(min(done, total), total)

    for number, tensors in enumerate(files):
        name = f"model/model-00000-of-00001-{number:05d}.safetensors"
        with _MadeAhead(_file_pieces(source, tensors)) as pieces:
            seals[name] = storage.write_pieces(aside / name, counted(pieces))
    return seals


def _file_pieces(source: TensorSource, tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> Iterator[Any]:
    """A safetensors file of these tensors, piece by piece."""
    header, places = lay_out(tensors, {})
    yield header
    for name, place in places.items():
        for chunk in row_chunks(source, name):
            values = chunk.to(place.dtype)
            check_finite(values, chunk, f"tensor {name}", "these weights are damaged: take other ones")
            if values.numel():
                yield raw_bytes(values.contiguous())


def row_chunks(source: TensorSource, name: str) -> Iterator[Tensor]:
    """A whole tensor in boxes of a few MB, from its first row to its last."""
    shape = tuple(source.shape(name))
    if not shape or not prod(shape):
        yield source.read(name, (0,) * len(shape), shape)
        return
    row = prod(shape[1:]) * source.dtype(name).itemsize
    step = max(1, _CHUNK // row)
    rest = (0,) * (len(shape) - 1)
    for begin in range(0, shape[0], step):
        yield source.read(name, (begin, *rest), (min(step, shape[0] - begin), *shape[1:]))


class _MadeAhead:
    """Pieces that a thread makes a few ahead of their use, as an iterator for a `with` block, whose end stops it."""

    def __init__(self, pieces: Pieces, depth: int = 4) -> None:
        self._pieces = pieces
        self._queue: Queue[Any] = Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._make, name="reader of weights", daemon=True)

    def __enter__(self) -> Iterator[bytes | memoryview]:
        self._thread.start()
        return self._taken()

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _make(self) -> None:
        try:
            for piece in self._pieces:
                self._offer(piece)
            self._offer(None)
        except BaseException as error:
            self._offer(error)

    def _offer(self, item: Any) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except Full:
                continue

    def _taken(self) -> Iterator[bytes | memoryview]:
        while True:
            try:
                item = self._queue.get(timeout=1.0)
            except Empty:
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
