"""What a training stage takes over at its start: weights, optimizer and cursors, each by itself (`[[stages]] take`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron.checkpoint.averaged_members import AVERAGED
from megatron.checkpoint.board import Board
from megatron.checkpoint.imported import ORIGIN
from megatron.checkpoint.manager import CheckpointRef
from megatron.checkpoint.tensor_shards import TensorSource
from megatron.config.errors import CheckpointError, ConfigError
from megatron.config.model_shape import NO_FUNCTION, ModelShape
from megatron.config.schema import StageSection
from megatron.data.schedule import Schedule
from megatron.engines.base import Engine
from megatron.engines.model_parts import InitialWeights
from megatron.hf.import_weights import HuggingFaceTensors
from megatron.trainer.resume import Say, whole_checkpoint_at
from megatron.trainer.state import TrainerState

KEEP = ("continue", "fresh")


class StageStart:
    """Called with a stage's name when its first step is about to be taken.

    All ranks call it together; board: where they meet. `seed` gives the weights of step 0 again. Cursors are the data
    package's business; here they are only put on record.
    """

    def __init__(
        self,
        sections: Sequence[StageSection],
        shape: ModelShape,
        engine: Engine,
        state: TrainerState,
        seed: int,
        say: Say,
        board: Board | None = None,
    ) -> None:
        self._board = board
        self._sections = {section.name: section for section in sections}
        self._shape = shape
        self._engine = engine
        self._state = state
        self._seed = seed
        self._say = say

    def __call__(self, name: str) -> None:
        """Begins the training stage `name`."""
        take = self._sections[name].take
        asked = {key: value for key, value in take.model_dump().items() if value != "continue"}
        words = f": {', '.join(f'{key} from {value}' for key, value in asked.items())}" if asked else ""
        self._say(f"training stage {name} begins at step {self._state.step + 1}{words}")
        # Weights first: an engine may derive its optimizer's masters from them.
        if take.weights != "continue":
            self._engine.load_model_state(self._weights(take.weights))
        if take.optimizer == "fresh":
            self._engine.reset_optimizer()
        elif take.optimizer != "continue":
            self._engine.load_optimizer_state(whole_checkpoint_at(Path(take.optimizer), self._board).optimizer())
        if asked:
            self._state.taken[name] = asked

    def _weights(self, words: str) -> TensorSource:
        if words == "fresh":
            return InitialWeights(self._shape, self._seed)
        path = Path(words)
        if is_hugging_face(path):
            return HuggingFaceTensors(path, self._shape)
        return whole_checkpoint_at(path, self._board).model()


def check_takes(sections: Sequence[StageSection], shape: ModelShape, board: Board | None = None) -> None:
    """All ranks of the board: looks at everything that the stages yet to begin will take over, so that a mistake is
    found before training. Of a Hugging Face folder that is every name, size and dtype, but no value.

    Raises CheckpointError or ConfigError that names the stage.
    """
    for section in sections:
        for key, words in section.take.model_dump().items():
            if words in KEEP:
                continue
            path = Path(words)
            where = f"stage {section.name!r}: take.{key} = {words!r}"
            if not path.is_dir():
                raise ConfigError(f"{where}: no such folder: give a checkpoint folder or a run's output folder")
            try:
                if is_hugging_face(path) and key == "weights":
                    HuggingFaceTensors(path, shape)
                else:
                    _check_imported(whole_checkpoint_at(path, board), key, shape)
            except (CheckpointError, ConfigError) as error:
                raise type(error)(f"{where}: {error}") from None


def _check_imported(found: CheckpointRef, key: str, shape: ModelShape) -> None:
    """Raises ConfigError where the checkpoint is an imported model or an average, and more than it has is asked of it,
    or its weights would mean another function: what sizes do not show is compared, as with a Hugging Face folder."""
    if AVERAGED in found.state and key == "optimizer":
        raise ConfigError('an average has weights and a data position, no optimizer: say optimizer = "fresh"')
    if ORIGIN not in found.state:
        return
    if key != "weights":
        raise ConfigError(f"an imported model has weights alone, no {key}")
    theirs, ours = ModelShape.from_json(found.state["model"]).to_json(), shape.to_json()
    names = sorted((theirs.keys() | ours.keys()) - NO_FUNCTION)
    different = [
        f"{n} is {theirs.get(n)!r}, the model has {ours.get(n)!r}" for n in names if theirs.get(n) != ours.get(n)
    ]
    if different:
        raise ConfigError(
            f"{'; '.join(different)}: its weights would mean another function: take [model] from "
            f"{found.path}/config.toml"
        )


def check_goes_on(found: CheckpointRef, sections: Sequence[StageSection], schedule: Schedule) -> None:
    """Looks at whether a run can go on from a checkpoint that may be an average, which has no optimizer state.

    Raises ConfigError where the training stage that comes next, or goes on, would continue an optimizer.
    """
    consumed = found.state["consumed_samples"]
    if AVERAGED not in found.state or consumed >= schedule.samples:
        return
    stage = schedule.locate(consumed)[0]
    where = f"{found.path}: is an average, which has no optimizer state"
    if stage.start_sample < consumed:
        raise ConfigError(
            f"{where}, and stage {stage.name!r} is at sample {consumed - stage.start_sample:,} of {stage.samples:,}, "
            "where it would go on with it: end the stage there (samples) and begin another with take = { optimizer = "
            f'"fresh" }}, or take = {{ weights = "{found.path}", optimizer = "fresh" }} in a stage of a new run'
        )
    if sections[stage.index].take.optimizer == "continue":
        raise ConfigError(
            f"{where}, and stage {stage.name!r}, which comes next, would go on with it: set stages.{stage.name}.take = "
            '{ optimizer = "fresh" }'
        )


def is_hugging_face(path: Path) -> bool:
    """Whether a folder is an exported model rather than a checkpoint or a run."""
    return (path / "config.json").is_file() and not (path / "manifest.json").exists()
