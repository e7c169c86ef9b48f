"""Half a run at one layout, saved as the trainer saves it, and the other half at another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from layouts.cases import Key, LayoutCase
from layouts.curves import HALF, Curve, Rank, engine_of, open_rank

from megatron.checkpoint.manager import CheckpointManager
from megatron.checkpoint.tensor_shards import TensorShards
from megatron.engines.base import Engine
from megatron.parallel.mesh import close_mesh
from megatron.parallel.rank_board import board_of


@dataclass(frozen=True)
class Stretch:
    """Some steps, and the SHA-256 of every shard that this rank holds after them."""

    curve: Curve
    state: dict[str, str]


def first_half(
    case: LayoutCase, corpora: Path, folder: Path, keys: Sequence[Key], onward: bool = False
) -> dict[Key, Stretch]:
    """The body of a rank: ten steps and a checkpoint under `folder` for each key. onward: ten steps more."""
    rank, done = open_rank(case, corpora), {}
    for key in keys:
        engine = engine_of(rank, key)
        curve = rank.train(engine, key, rank.batches[:HALF])
        manager = _manager(rank, folder, key)
        state = {"data": rank.batches[HALF - 1].position}
        manager.save(HALF, engine.model_state(), engine.optimizer_state(), engine.rng_state(), state)
        if onward:
            curve += rank.train(engine, key, rank.batches[HALF:])
        done[key] = Stretch(curve, _state_of(engine))
    close_mesh()
    return done


def second_half(
    case: LayoutCase, corpora: Path, folder: Path, keys: Sequence[Key], forgetful: bool = False
) -> dict[Key, Stretch]:
    """The body of a rank: from the checkpoints of `first_half` to the end. forgetful: without optimizer state."""
    (checkpoint,) = _place(folder, keys[0]).glob("step-*")
    position = json.loads((checkpoint / "state.json").read_text())["data"]
    rank, done = open_rank(case, corpora, position), {}
    for key in keys:
        engine = engine_of(rank, key)
        found = _manager(rank, folder, key).newest_whole(print)
        assert found is not None and found.step == HALF
        engine.load_model_state(found.model())
        if not forgetful:
            engine.load_optimizer_state(found.optimizer())
        engine.load_rng_state(found.rng())
        curve = rank.train(engine, key, rank.batches)
        done[key] = Stretch(curve, _state_of(engine))
    close_mesh()
    return done


def _place(folder: Path, key: Key) -> Path:
    return folder / "-".join(key).replace(", ", "-")


def _manager(rank: Rank, folder: Path, key: Key) -> CheckpointManager:
    return CheckpointManager(_place(folder, key), board=board_of(rank.mesh, "-".join(key)), seconds=60)


def _state_of(engine: Engine) -> dict[str, str]:
    parts: dict[str, TensorShards] = {"model": engine.model_state(), "optimizer": engine.optimizer_state()}
    return {
        f"{part}/{name}@{shard.offset}": hashlib.sha256(shard.tensor.cpu().contiguous().numpy().tobytes()).hexdigest()
        for part, tensors in parts.items()
        for name, shards in tensors.items()
        for shard in shards
    }
