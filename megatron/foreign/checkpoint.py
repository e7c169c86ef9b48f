"""A checkpoint of another trainer, opened: what it is, the shape that it means, and its weights by our names."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron.config.errors import CheckpointError, ConfigError
from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.schema import ModelSection
from megatron.foreign.megatron_args import COMPARED, ForeignModel, model_of_args
from megatron.foreign.megatron_args import READ as MEGATRON_READ
from megatron.foreign.megatron_folder import MegatronFiles, open_megatron
from megatron.foreign.megatron_weights import Habits, drifted, megatron_tensors
from megatron.foreign.neox_config import READ as NEOX_READ
from megatron.foreign.neox_config import config_paths, fields_of_config, read_configs
from megatron.foreign.neox_folder import NeoxFiles, is_neox_folder, open_neox
from megatron.foreign.neox_weights import NeoxLayers, neox_tensors
from megatron.foreign.padding import Padding, padding_of
from megatron.foreign.pieces import ForeignTensors
from megatron.foreign.torch_file import TorchFile, require_allowed


@dataclass(frozen=True)
class ForeignCheckpoint:
    """An opened checkpoint.

    trainer: who wrote it. model: what it is in our words. padding: how many rows of its embedding can be
    that. said: lines for the user. tensors: its weights, for the shape that `foreign_shape` gives. notes: of what
    reading them shows.
    """

    trainer: str
    folder: Path
    step: int | str
    ranks: str
    model: ForeignModel
    padding: Padding
    said: Sequence[str]
    ignored: Sequence[str]
    tensors: Callable[[ModelShape], ForeignTensors]
    notes: Callable[[], list[str]]
    files: Sequence[TorchFile]

    @property
    def words(self) -> int:
        """Rows of its embedding, padding included."""
        return self.padding.rows

    def fields(self, vocab_size: int | None) -> dict[str, Any]:
        """Keys of the [model] table. vocab_size: ids that are used; None: every row of the embedding."""
        return {**self.model.fields, "vocab_size": vocab_size or self.words}

    def origin(self) -> dict[str, Any]:
        """For the record of a checkpoint that is made of it."""
        return {"trainer": self.trainer, "folder": str(self.folder), "step": self.step, "ranks": self.ranks}

    def close(self) -> None:
        """Lets go of the files."""
        for file in self.files:
            file.close()


def open_foreign(
    path: Path,
    *,
    pickles_allowed: bool,
    iteration: int | None = None,
    configs: Sequence[Path] = (),
    overrides: Mapping[str, Any] | None = None,
    verify: bool = True,
) -> ForeignCheckpoint:
    """The checkpoint at `path`, which the folder's form says to be Megatron-LM's or GPT-NeoX'.

    pickles_allowed: by the user, by name. overrides: arguments said anew. verify: files are compared with their
    checksums. Raises ConfigError without permission and for what the decoder cannot express, else CheckpointError.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder: give the folder that Megatron-LM or GPT-NeoX saved into")
    require_allowed(pickles_allowed, path)
    _check_known(overrides or {}, NEOX_READ if is_neox_folder(path) else MEGATRON_READ)
    if is_neox_folder(path):
        return _neox(path, iteration, configs, overrides or {}, verify)
    if configs:
        raise ConfigError(
            f"{path}: --config is for GPT-NeoX, and this is no folder of it; Megatron-LM keeps args itself"
        )
    files = open_megatron(path, iteration, COMPARED, verify)
    return _megatron(files, overrides or {})


def foreign_shape(checkpoint: ForeignCheckpoint, vocab_size: int | None) -> ModelShape:
    """The decoder that the checkpoint means, with so many words. Raises ConfigError, CheckpointError."""
    fields = checkpoint.fields(vocab_size)
    try:
        section = ModelSection.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"{checkpoint.folder}: its {where} cannot be: {first['msg']} (found {first['input']!r:.60})"
        ) from None
    learned = section.position_embedding == "learned"
    return resolve_model(section, fields["vocab_size"], None if learned else checkpoint.model.max_position_embeddings)


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` each, the value as JSON, True, False or None, or text. Raises ConfigError."""
    plain = {"True": True, "False": False, "None": None}
    found: dict[str, Any] = {}
    for item in words:
        name, equals, value = item.partition("=")
        name = name.replace("-", "_")
        if not equals or not name.isidentifier():
            raise ConfigError(f"--set {item}: give NAME=VALUE with the name of an argument")
        try:
            found[name] = plain[value] if value in plain else json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _check_known(overrides: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises ConfigError for an argument said anew that nothing here reads, with the nearest that something does."""
    for name in overrides:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
            raise ConfigError(
                f"--set {name}: no argument of this name is read"
                + (f": did you mean {near[0]}?" if near else ": docs/megatron.md lists those that are")
            )


def _megatron(files: MegatronFiles, overrides: Mapping[str, Any]) -> ForeignCheckpoint:
    args = {**files.args, **overrides}
    model = model_of_args(args, str(files.files[0].path), files.version, files.era, overrides)
    first = files.chunks[0][0].get("embedding.weight")
    if first is None:
        raise CheckpointError(f"{files.files[0].path}: holds no embedding of words: not a GPT of Megatron-LM")
    padding = padding_of([rank["embedding.weight"] for rank in files.chunks[0]], args, str(files.files[0].path))
    words = padding.rows
    said = args.get("padded_vocab_size")
    if isinstance(said, int) and said != words:
        raise CheckpointError(
            f"{first}: {words} words on {files.tensor_ranks} tensor ranks, and args.padded_vocab_size is {said}: a "
            "rank is missing, or of another checkpoint"
        )
    virtual = len(files.chunks) // files.pipeline_ranks
    ranks = f"{files.tensor_ranks} tensor x {files.pipeline_ranks} pipeline ranks"
    ranks += f" with {virtual} chunks each" if virtual > 1 else ""
    lines = [f"{files.era} names, checkpoint_version {files.version:g}, {ranks}", *model.said]
    lines += [f"--set {name}: {overrides[name]!r} instead of {files.args.get(name)!r:.60}" for name in overrides]

    def notes() -> list[str]:
        apart = drifted(files)
        if not apart:
            return []
        name, largest = max(apart, key=lambda item: item[1])
        return [
            f"{len(apart)} tensors that all tensor ranks should hold alike differ between them, at most by "
            f"{largest:.3g} ({name}); rank 0's are taken, as Megatron-LM's own converter does"
        ]

    return ForeignCheckpoint(
        "Megatron-LM",
        files.folder,
        files.iteration,
        ranks,
        model,
        padding,
        lines,
        [*files.ignored, *model.ignored],
        lambda shape: megatron_tensors(files, shape, model.habits),
        notes,
        files.files,
    )


def _neox(
    path: Path, step: int | None, configs: Sequence[Path], overrides: Mapping[str, Any], verify: bool
) -> ForeignCheckpoint:
    files: NeoxFiles = open_neox(path, step, verify)
    paths = config_paths(files.folder, configs)
    read = read_configs(paths)
    config = {**read, **overrides}
    where = ", ".join(map(str, paths))
    fields = fields_of_config(config, where)
    _check_neox_args(files, config, where)
    shown = NeoxLayers(files).shown_by_weights(fields["gated_mlp"])
    fields |= {key: value for key, value in shown.items() if value or key != "query_key_value_bias"}
    parts = [rank["word_embeddings.weight"] for rank in files.layers.get(0, []) if "word_embeddings.weight" in rank]
    if not parts:
        raise CheckpointError(f"{files.folder}: layer 0 holds no word_embeddings.weight")
    model = replace(_neox_model(fields, config), ignored=tuple(files.ignored))
    ranks = f"{files.model_ranks} model-parallel ranks"
    lines = [f"{ranks}, {len(files.files)} files, configs {', '.join(item.name for item in paths)}", *model.said]
    lines += [f"--set {name}: {overrides[name]!r} instead of {read.get(name)!r:.60}" for name in overrides]
    return ForeignCheckpoint(
        "GPT-NeoX",
        files.folder,
        files.step,
        ranks,
        model,
        padding_of(parts, config, where),
        lines,
        files.ignored,
        lambda shape: neox_tensors(files, shape),
        list,
        files.files,
    )


def _neox_model(fields: Mapping[str, Any], config: Mapping[str, Any]) -> ForeignModel:
    line = (
        f"{fields['num_hidden_layers']} layers of {fields['hidden_size']}, {fields['num_attention_heads']} heads"
        f"{'' if fields['num_key_value_heads'] == fields['num_attention_heads'] else ' in groups'}, "
        f"{'gated ' if fields['gated_mlp'] else ''}MLP of {fields['intermediate_size']} with {fields['hidden_act']}, "
        f"{fields['norm']} ({fields['norm_eps']:g}), {'parallel' if fields['parallel_block'] else 'serial'} blocks"
    )
    return ForeignModel(fields, Habits(), config["max_position_embeddings"], (line,))


def _check_neox_args(files: NeoxFiles, config: Mapping[str, Any], where: str) -> None:
    """The few arguments that GPT-NeoX keeps in the checkpoint itself must be the configs'."""
    for key in ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "model_parallel_size"):
        kept, said = files.args.get(key), config.get(key)
        if isinstance(kept, int) and isinstance(said, int) and kept != said:
            raise CheckpointError(
                f"{where}: {key} is {said}, and {kept} in {files.files[0].path}: another run's config?"
            )
