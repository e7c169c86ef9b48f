"""A folder of Megatron-LM's classic checkpoints: which iteration, which ranks, and what each rank's file holds.

    FOLDER/latest_checkpointed_iteration.txt      a number, or "release"
    FOLDER/iter_0001000/mp_rank_00/model_optim_rng.pt          tensor rank 0, without pipeline
    FOLDER/iter_0001000/mp_rank_01_002/model_optim_rng.pt      tensor rank 1, pipeline rank 2

A file holds args (an argparse.Namespace), checkpoint_version, iteration, and model; or model0, model1, … of a pipeline
rank with several chunks, which are stages 0, p, 2p, … of p further apart (megatron/training/checkpointing.py there).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.config.errors import CheckpointError, ConfigError
from megatron.foreign.megatron_names import Era, era_of, is_weight, one_name
from megatron.foreign.pieces import StoredTensor
from megatron.foreign.torch_file import TorchFile, flat_tensors, namespace, printable

TRACKER = "latest_checkpointed_iteration.txt"
FILES = ("model_optim_rng.pt", "model_rng.pt")
"""The second where the optimizer lies apart, cut over data ranks."""
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
_DISTRIBUTED = ("metadata.json", ".metadata")
_KEPT = frozenset({"args", "checkpoint_version", "iteration", "total_iters", "model"})

Chunk = Sequence[Mapping[str, StoredTensor]]
"""By tensor rank, a model chunk's tensors under the one set of names, its layers counted from 0."""


@dataclass(frozen=True)
class MegatronFiles:
    """An opened checkpoint. chunks: in the order of the model. ignored: what else the files hold, by key."""

    folder: Path
    iteration: int | str
    version: float
    args: Mapping[str, Any]
    era: Era
    tensor_ranks: int
    pipeline_ranks: int
    chunks: Sequence[Chunk]
    ignored: Sequence[str]
    files: Sequence[TorchFile]


def iteration_folder(path: Path, iteration: int | None = None) -> Path:
    """The folder with the ranks: of an iteration, of the one that the tracker names, or `path` itself.

    Raises CheckpointError where there is none, ConfigError where the choice is the user's.
    """
    if any(path.glob("mp_rank_*")) or any((path / name).is_file() for name in _DISTRIBUTED):
        return path
    there = _iterations(path)
    if iteration is not None:
        if iteration not in there:
            raise CheckpointError(f"{path}: no iteration {iteration}: there are {_listed(sorted(there))}")
        return there[iteration]
    tracker = path / TRACKER
    if tracker.is_file():
        words = tracker.read_text(encoding="utf-8", errors="replace").strip()
        if words == "release" and (path / "release").is_dir():
            return path / "release"
        if not words.isdecimal() or int(words) not in there:
            raise CheckpointError(
                f"{tracker}: names {words[:40]!r}, and there are {_listed(sorted(there))}: say --iteration"
            )
        return there[int(words)]
    if len(there) == 1:
        return next(iter(there.values()))
    if there:
        raise ConfigError(f"{path}: holds {_listed(sorted(there))} and no {TRACKER}: say --iteration")
    raise CheckpointError(f"{path}: no mp_rank_* and no iter_* folder: not a checkpoint of Megatron-LM")


def _iterations(path: Path) -> dict[int, Path]:
    names = ((found.name.removeprefix("iter_"), found) for found in path.glob("iter_*") if found.is_dir())
    return {int(number): found for number, found in names if number.isdecimal()}


def _listed(numbers: Sequence[int]) -> str:
    return f"iterations {', '.join(map(str, numbers[:8]))}{', …' if len(numbers) > 8 else ''}" if numbers else "none"


def open_megatron(path: Path, iteration: int | None, compared: Sequence[str], verify: bool = True) -> MegatronFiles:
    """Opens every rank's file and brings them together; no tensor is read.

    compared: args that all ranks must have alike. verify: compares each file with its checksums first, which reads all
    of it. Raises CheckpointError naming files, keys and values that are missing or disagree.
    """
    folder = iteration_folder(Path(path), iteration)
    paths, tensor, pipeline = _rank_files(folder)
    files: dict[tuple[int, int], TorchFile] = {}
    for rank, file in paths.items():
        files[rank] = TorchFile(file)
        if verify:
            files[rank].verify()
    contents = {rank: _content(file) for rank, file in files.items()}
    first = files[0, 0].path
    args = _args(contents[0, 0], first)
    for rank, content in contents.items():
        _check_alike(first, contents[0, 0], args, files[rank].path, content, compared)
    version = float(contents[0, 0].get("checkpoint_version", 0))
    if version not in (0.0, 1.0, 2.0, 3.0):
        raise CheckpointError(f"{first}: checkpoint_version {version:g} is unknown: there are 0, 1, 2 and 3")
    _check_grid(first, args, version, tensor, pipeline)
    chunks, era = _chunks(files, contents, tensor, pipeline)
    others = {str(key) for content in contents.values() for key in content}
    ignored = [printable(key) for key in sorted(others - _KEPT - set(_model_keys(contents[0, 0])))]
    number = contents[0, 0].get("iteration", contents[0, 0].get("total_iters"))
    number = number if isinstance(number, int) else folder.name
    return MegatronFiles(folder, number, version, args, era, tensor, pipeline, chunks, ignored, list(files.values()))


def _rank_files(folder: Path) -> tuple[dict[tuple[int, int], Path], int, int]:
    """Each (tensor rank, pipeline rank)'s file, and how many ranks there are of both."""
    found: dict[tuple[int, int], Path] = {}
    for path in sorted(folder.glob("mp_rank_*")):
        match = _RANK.fullmatch(path.name)
        if match is None:
            raise CheckpointError(
                f"{path}: neither mp_rank_TT nor mp_rank_TT_PPP: files of experts are not read, as a mixture of "
                "experts is a model that the decoder cannot express"
            )
        rank = (int(match[1]), int(match[2] or 0))
        file = next((path / name for name in FILES if (path / name).is_file()), None)
        if file is None:
            raise CheckpointError(f"{path}: holds no {FILES[0]}: the checkpoint is not whole")
        if rank in found:
            raise CheckpointError(
                f"{path}: tensor rank {rank[0]}, pipeline rank {rank[1]} is in {found[rank].parent} too"
            )
        found[rank] = file
    if not found:
        if any((folder / name).is_file() for name in _DISTRIBUTED):
            raise CheckpointError(
                f"{folder}: a distributed checkpoint (--ckpt-format torch_dist), which only Megatron-LM reads. Convert "
                "it there: load it with --ckpt-convert-format torch --ckpt-convert-save FOLDER, and import "
                "FOLDER/torch"
            )
        raise CheckpointError(f"{folder}: no mp_rank_* folder: not a checkpoint of Megatron-LM")
    tensor, pipeline = (1 + max(rank[axis] for rank in found) for axis in (0, 1))
    missing = [(t, p) for t in range(tensor) for p in range(pipeline) if (t, p) not in found]
    if missing:
        names = ", ".join(f"mp_rank_{t:02d}{f'_{p:03d}' if pipeline > 1 else ''}" for t, p in missing[:8])
        raise CheckpointError(f"{folder}: {names} missing, of {tensor} tensor x {pipeline} pipeline ranks")
    return found, tensor, pipeline


def _content(file: TorchFile) -> dict[str, Any]:
    if not isinstance(file.content, dict) or not _model_keys(file.content):
        keys = list(file.content)[:8] if isinstance(file.content, dict) else type(file.content).__name__
        raise CheckpointError(f"{file.path}: holds no model, but {keys}: not a checkpoint of Megatron-LM")
    return file.content


def _model_keys(content: Mapping[str, Any]) -> list[str]:
    """model, or model0, model1, … in order."""
    numbered = [f"model{number}" for number in range(len(content)) if f"model{number}" in content]
    return ["model"] if "model" in content else numbered


def _args(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    args = content.get("args")
    found = dict(args) if isinstance(args, dict) else namespace(args)
    if found is None:
        raise CheckpointError(
            f"{path}: holds no args (an argparse.Namespace), so the model's shape is not known: load and save the "
            "checkpoint once with Megatron-LM, which writes them"
        )
    return found


def _check_alike(
    first: Path,
    wanted: Mapping[str, Any],
    args: Mapping[str, Any],
    path: Path,
    content: Mapping[str, Any],
    compared: Sequence[str],
) -> None:
    """Raises CheckpointError where two ranks' files are not of one checkpoint."""
    theirs = _args(content, path)
    values = [(key, wanted.get(key), content.get(key)) for key in ("iteration", "checkpoint_version")]
    values += [(f"args.{key}", args.get(key), theirs.get(key)) for key in compared]
    for key, ours, other in values:
        if isinstance(ours, int | float | str | bool | None) and ours != other:
            raise CheckpointError(f"{path}: {key} is {other!r:.60}, and {ours!r} in {first}: of different checkpoints?")
    if _model_keys(wanted) != _model_keys(content):
        raise CheckpointError(
            f"{path}: holds {', '.join(_model_keys(content))}, and {first} holds {', '.join(_model_keys(wanted))}"
        )


def _check_grid(first: Path, args: Mapping[str, Any], version: float, tensor: int, pipeline: int) -> None:
    """Raises CheckpointError where args count other ranks than there are: a whole rank may be missing at the end."""
    words = "tensor_model_parallel_size" if version >= 3 else "model_parallel_size"
    for key, found, kind in ((words, tensor, "tensor"), ("pipeline_model_parallel_size", pipeline, "pipeline")):
        said = args.get(key)
        if isinstance(said, int) and said != found:
            raise CheckpointError(
                f"{first.parent.parent}: files of {found} {kind} ranks, and args.{key} is {said}: the checkpoint is "
                "not whole"
            )


def _chunks(
    files: Mapping[tuple[int, int], TorchFile],
    contents: Mapping[tuple[int, int], Mapping[str, Any]],
    tensor: int,
    pipeline: int,
) -> tuple[list[Chunk], Era]:
    """Stages in the order of the model: all pipeline ranks' first chunks, then all their second ones."""
    chunks: list[Chunk] = []
    eras: dict[Era, str] = {}
    for key in _model_keys(contents[0, 0]):
        for stage in range(pipeline):
            ranks = []
            for rank in range(tensor):
                file = files[rank, stage]
                named = dict(_named(file, key, contents[rank, stage][key]))
                ranks.append({name: stored for name, (stored, _) in named.items()})
                eras |= {era: str(stored) for stored, era in named.values()}
            _check_same_names(ranks, stage)
            chunks.append(ranks)
    if len(eras) > 1:
        raise CheckpointError(f"{eras['legacy']} and {eras['mcore']} are named in words of different eras")
    return chunks, next(iter(eras), "mcore")


def _named(file: TorchFile, key: str, tree: Any) -> Iterator[tuple[str, tuple[StoredTensor, Era]]]:
    seen: dict[str, str] = {}
    for theirs, record in flat_tensors(f"{file.path}: {key}", tree):
        if not is_weight(theirs):
            continue
        name = one_name(theirs)
        if name is None:
            raise CheckpointError(
                f"{file.path}: {key}: tensor {printable(theirs)} of {list(record.shape)} is none of a plain GPT or "
                "Llama, which is what can be imported"
            )
        if name in seen:
            raise CheckpointError(
                f"{file.path}: {key}: {printable(theirs)} and {printable(seen[name])} are the same tensor"
            )
        seen[name] = theirs
        yield name, (StoredTensor(file, theirs, record), era_of(theirs))


def _check_same_names(ranks: Sequence[Mapping[str, StoredTensor]], stage: int) -> None:
    for rank, names in enumerate(ranks):
        if odd := sorted(names.keys() ^ ranks[0].keys()):
            raise CheckpointError(
                f"tensor ranks 0 and {rank} of pipeline rank {stage} hold different tensors, for example {odd[0]}: "
                f"{next(iter([*names.values(), *ranks[0].values()])).file.path}"
            )
