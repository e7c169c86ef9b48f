"""The Hugging Face folder of whatever the user calls a model: itself, or a checkpoint's export, kept or thrown away."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.checkpoint.manifest import NAME as MANIFEST
from megatron.config.errors import ConfigError
from megatron.config.version import VERSION
from megatron.hf.checkpoint_source import CheckpointSource, is_checkpoint, open_source
from megatron.hf.export import export_checkpoint


def named_model(words: str) -> tuple[str, Path]:
    """(name, path) of [NAME=]PATH; without a name the folder's."""
    name, equals, path = words.partition("=")
    if not equals:
        return Path(words).name or words, Path(words)
    return name, Path(path)


def check_models(words: list[str]) -> None:
    """Raises ConfigError for a folder that is not there and for two models of one name."""
    names = [named_model(one)[0] for one in words]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"two models are called {', '.join(sorted(repeated))}: give them names, --model NAME=PATH")
    for one in words:
        if not named_model(one)[1].is_dir():
            raise ConfigError(f"--model {one}: no such folder")


@contextmanager
def model_folder(path: Path, cache: Path | None) -> Iterator[Path]:
    """A folder that transformers loads. A checkpoint, or a run's newest, is exported: into `cache`, where the same
    content is found again, or into a scratch folder that is gone afterwards."""
    if not is_checkpoint(path):
        yield path
        return
    source = open_source(path)
    if cache is None:
        with tempfile.TemporaryDirectory(prefix="stagemix-export-") as scratch:
            yield export_checkpoint(source, Path(scratch) / "model").folder
        return
    folder = cache / snapshot_key(source)
    if folder.is_dir():  # published by one rename, so it is whole
        print(f"{path}: its export is reused from {folder}", flush=True)
        yield folder
    else:
        yield export_checkpoint(source, folder).folder


def snapshot_key(source: CheckpointSource) -> str:
    """Of a checkpoint's content and of the version that exports it: the manifest holds a checksum of every file."""
    content = (source.ref.path / MANIFEST).read_bytes()
    return f"snapshot-{hashlib.sha256(content + VERSION.encode()).hexdigest()[:24]}"
