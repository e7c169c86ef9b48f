"""From a Hugging Face folder to a checkpoint of step 0: streamed, with its tokenizer, its config and its origin.

Only safetensors, JSON and tokenizer files are read (law C2): code and pickles that lie in the folder stay as they are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.imported import write_imported
from megatron.checkpoint.manifest import sha256_of
from megatron.checkpoint.weights_alone import check_free
from megatron.config.errors import CheckpointError, ConfigError, DataError, UnavailableError
from megatron.config.model_shape import ModelShape
from megatron.hf.architecture import CONFIG, architecture_for, read_config, shape_from_folder, training_notes
from megatron.hf.continued_config import continued_config
from megatron.hf.import_weights import INDEX, HuggingFaceTensors, tensor_files
from megatron.hf.special_token_ids import read_token_ids
from megatron.tokenizers.base import Tokenizer
from megatron.tokenizers.load import load_tokenizer

KIND = "hugging_face"
DTYPES = {"keep": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_READ = ("*.json", "*.safetensors", "*.model", "*.tiktoken")


@dataclass(frozen=True)
class Imported:
    """An import that was published. parameters: of the model, a tied head once, without the padding of the vocabulary.
    tokenizer: None where the checkpoint has none, for the reason in `notes`."""

    checkpoint: Path
    architecture: str
    shape: ModelShape
    parameters: int
    dtypes: tuple[str, ...]
    bytes: int
    tokenizer: Tokenizer | None
    notes: tuple[str, ...]


def import_folder(
    folder: Path,
    output: Path,
    *,
    dtype: str = "keep",
    tokenizer: str | None = None,
    without_tokenizer: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Imported:
    """Writes the checkpoint `output` from the model in `folder` and publishes it by one rename.

    dtype: a key of DTYPES. tokenizer: a path, instead of the folder's own.
    Raises CheckpointError (files that are missing, damaged or lie elsewhere; weights that are not finite, or not what
    config.json says), ConfigError (a model that the decoder cannot express; output exists), DataError (a tokenizer with
    more ids than the embedding has rows, or one that was named and cannot be read), StorageError.
    """
    folder, output = Path(folder), Path(output)
    check_free(output, overwrite)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder: give one with config.json and safetensors")
    check_links(folder)
    shape = shape_from_folder(folder)
    source = HuggingFaceTensors(folder, shape)
    notes = training_notes(read_config(folder / CONFIG))
    opened = None if without_tokenizer else _tokenizer(folder, tokenizer, shape, notes)
    files = opened.files() if opened else []
    architecture, name = architecture_for(shape).name, model_name(folder)
    ids = read_token_ids(folder)
    notes += [
        f"{words}: text never holds it, and generation never ends at it" for words in ids.beyond(shape.vocab_size)
    ]
    origin = {"kind": KIND, "folder": name, "architecture": architecture, "tokens": ids.to_json()}
    hashes, place = _Hashes(folder), output.absolute()
    write_imported(
        output,
        source,
        shape.to_json(),
        files,
        continued_config(shape, name.rpartition("/")[2], f"{name}, {architecture}", place, _place_of(opened, place)),
        lambda: {**origin, "files": hashes.finished()},
        tokenizer=_identity(opened) if opened else None,
        dtype=DTYPES[dtype],
        overwrite=overwrite,
        progress=progress,
    )
    found = {name: DTYPES[dtype] or source.dtype(name) for name in source.names()}
    dtypes = tuple(sorted({str(item).removeprefix("torch.") for item in found.values()}))
    size = sum(prod(source.shape(name)) * item.itemsize for name, item in found.items())
    return Imported(output, architecture, shape, source.parameters, dtypes, size, opened, tuple(notes))


def model_name(folder: Path) -> str:
    """Of the folder, for people; in the Hugging Face hub's cache its folder is a revision, and one above says it."""
    root = folder.resolve()
    if root.parent.name == "snapshots":
        return root.parent.parent.name.removeprefix("models--").replace("--", "/")
    return root.name


def check_links(folder: Path) -> None:
    """Raises CheckpointError for a file that is a link to a place outside the folder.

    Allowed besides is the Hugging Face hub's cache, whose snapshots/REVISION hold links to blobs beside them.
    """
    root = folder.resolve()
    allowed = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    for path in sorted(path for pattern in _READ for path in folder.glob(pattern)):
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in allowed):
            raise CheckpointError(
                f"{path}: is a link to {path.resolve()}, outside the folder: only the folder's own files are read: "
                "copy that file here if it belongs to the model"
            )


def _tokenizer(folder: Path, named: str | None, shape: ModelShape, notes: list[str]) -> Tokenizer | None:
    try:
        tokenizer = load_tokenizer(named or folder)
    except (DataError, UnavailableError) as error:
        if named:
            raise
        notes.append(
            f"no tokenizer was imported: {error}. Name the tokenizer of your data in [tokenizer] path before training; "
            "an export has none unless it is told --tokenizer"
        )
        return None
    if tokenizer.vocab_size > shape.vocab_size:
        raise DataError(
            f"{named or folder}: the tokenizer {tokenizer.name} gives ids up to {tokenizer.vocab_size - 1}, and the "
            f"embedding has {shape.vocab_size} rows: name the model's own with --tokenizer PATH, or import without one "
            "(--no-tokenizer)"
        )
    names = [path.name for path in tokenizer.files()]
    if len(set(names)) != len(names):
        raise ConfigError(f"{named or folder}: two files of the tokenizer are called {names}: rename one")
    return tokenizer


def _place_of(tokenizer: Tokenizer | None, checkpoint: Path) -> Path | None:
    """Where the checkpoint's config finds the tokenizer: its copy, or the built-in one by its name."""
    if tokenizer is None:
        return None
    files = tokenizer.files()
    return checkpoint / "tokenizer" / files[0].name if files else Path(tokenizer.name)


def _identity(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "name": tokenizer.name,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
    }


class _Hashes:
    """SHA-256 of the folder's files, taken in a thread while they are read for their weights anyway."""

    def __init__(self, folder: Path) -> None:
        named = [folder / CONFIG, folder / INDEX, *set(tensor_files(folder).values())]
        self._paths = sorted(path for path in named if path.is_file())
        self._found: dict[str, Mapping[str, Any]] = {}
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="hashes of the origin", daemon=True)
        self._thread.start()

    def finished(self) -> dict[str, Mapping[str, Any]]:
        """Bytes and sha256 by file name. Raises CheckpointError where a file cannot be read."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found

    def _run(self) -> None:
        try:
            for path in self._paths:
                self._found[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        except Exception as error:
            self._error = error
