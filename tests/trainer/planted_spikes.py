"""Runs with a spike planted in some batches, and twins that leave batches without an update by other means."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import CONFIG, Done, train, write_corpus

from megatron.metrics.console import Console

ROWS = 8
"""Sequences of a step."""
SHOWN_NEVER = 250
"""A word that the corpora do not have: as the target of every place it makes loss and gradient leap."""

SPIKES = """
[spikes]
policy = "{policy}"
window = 8
deviations = 5
at_most = 3
within = 40
back = 4
pass_over = 7
"""


def make_spiky_run(folder: Path, name: str = "run", policy: str = "none", steps: int = 24) -> Path:
    """A run of two stages over few letters, of which much is learnt; the config's path."""
    data = folder / "data"
    if not data.exists():
        write_corpus(data / "python", 1, highest=20)
        write_corpus(data / "prose", 2, highest=20)
    text = CONFIG[: CONFIG.index("[[stages]]")] + CONFIG[CONFIG.index("[checkpoint]") :].replace("keep = 2", "keep = 4")
    stages = f"""
[[stages]]
name = "first"
steps = {steps}
mixture = {{ code = 0.5, text = 0.5 }}
lr = {{ warmup = "2 steps", peak = 3e-3 }}

[[stages]]
name = "second"
steps = 4
mixture = {{ code = 0.1, text = 0.9 }}
"""
    path = folder / f"{name}.toml"
    path.write_text(text.format(output=folder / name, data=data) + stages + SPIKES.format(policy=policy))
    return path


def planted(steps: Sequence[int], rank: int) -> None:
    """A fault for `start_ranks`: the batches of these steps have targets that no batch has."""
    del rank
    _around(partial(_noise, frozenset(steps)))


def left_out(steps: Sequence[int], rank: int) -> None:
    """The twin of a skip: the steps are taken, and weights and optimizer state are put back as they were."""
    del rank
    _around(partial(_put_back, frozenset(steps)))


def never_run(steps: Sequence[int], rank: int) -> None:
    """The twin of what is passed over: the engine never hears of these steps."""
    del rank
    _around(partial(_nothing, frozenset(steps)))


def step_of(microbatches: Sequence[Any]) -> int:
    """The number of the step that rows belong to."""
    return int(microbatches[0].sample_numbers[0]) // ROWS + 1


def _around(wrapper: Callable[[Any, Callable[..., Any]], Callable[..., Any]]) -> None:
    import megatron.trainer.build as module

    build_engine = module.build_engine

    def build(*arguments: Any) -> Any:
        engine = build_engine(*arguments)
        engine.launch_step = wrapper(engine, engine.launch_step)
        return engine

    module.build_engine = build


def _noise(steps: frozenset[int], engine: Any, launch: Callable[..., Any]) -> Callable[..., Any]:
    def launch_step(microbatches: Sequence[Any], *rest: Any) -> Any:
        if step_of(microbatches) in steps:
            microbatches = [
                replace(m, targets=torch.where(m.targets < 0, m.targets, SHOWN_NEVER)) for m in microbatches
            ]
        return launch(microbatches, *rest)

    return launch_step


def _put_back(steps: frozenset[int], engine: Any, launch: Callable[..., Any]) -> Callable[..., Any]:
    from megatron.checkpoint.tensor_shards import WholeTensors

    def copies(state: Any) -> dict[str, torch.Tensor]:
        return {name: shards[0].tensor.detach().clone() for name, shards in state.items()}

    def launch_step(microbatches: Sequence[Any], *rest: Any) -> Any:
        if step_of(microbatches) not in steps:
            return launch(microbatches, *rest)
        weights, moments = copies(engine.model_state()), copies(engine.optimizer_state())
        done = launch(microbatches, *rest)
        done.result()
        engine.load_model_state(WholeTensors(weights))
        engine.load_optimizer_state(WholeTensors(moments))
        return done

    return launch_step


def _nothing(steps: frozenset[int], engine: Any, launch: Callable[..., Any]) -> Callable[..., Any]:
    from megatron.engines.base import DoneStep, StepResult

    def launch_step(microbatches: Sequence[Any], *rest: Any) -> Any:
        if step_of(microbatches) in steps:
            return DoneStep(StepResult(math.nan, {}, math.nan, 0, False, "left out by the test"))
        return launch(microbatches, *rest)

    return launch_step


SPIKE = 15
PASSED = range(12, 19)
"""What the roll-back from SPIKE passes over: back 4 and pass_over 7."""
Fault = Callable[[Sequence[int], int], None]


def ran(config: Path, fault: Fault | None = None, steps: Sequence[int] = (SPIKE,), words: Sequence[str] = ()) -> Done:
    """The run of a config with an engine that has this fault."""
    import megatron.trainer.build as module

    plain = module.build_engine
    try:
        if fault is not None:
            fault(steps, 0)
        return train(config, *words)
    finally:
        module.build_engine = plain


def tensors_of(output: Path) -> dict[str, Any]:
    """All tensors of a run's newest checkpoint."""
    newest = sorted((output / "checkpoints").glob("step-*"))[-1]
    files = sorted([*newest.glob("model/*"), *newest.glob("optimizer/*")])
    return {f"{path.parent.name} {name}": value for path in files for name, value in load_file(path).items()}


def assert_same_weights(one: Path, other: Path) -> None:
    mine, theirs = tensors_of(one), tensors_of(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not mine[name].equal(theirs[name])] == []


class stop_at:
    """While entered: a signal, or an error, when a row of this step is shown, the `turn`th time."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, step: int, turn: int = 1, error: type[Exception] | None = None
    ) -> None:
        self._patch, self._step, self._turn, self._error = monkeypatch, step, turn, error

    def __enter__(self) -> None:
        self._context = self._patch.context()
        patch, write, turns = self._context.__enter__(), Console.write, [0]

        def watched(console: Console, row: Any) -> None:
            write(console, row)
            if row.get("step") == self._step and "lr" in row:
                turns[0] += 1
                if turns[0] == self._turn and self._error:
                    raise self._error("planted")
                if turns[0] == self._turn:
                    os.kill(os.getpid(), signal.SIGUSR1)
                    time.sleep(0.1)  # steps that are passed over take less than a thread to hear it

        patch.setattr(Console, "write", watched)

    def __exit__(self, *exception: object) -> None:
        self._context.__exit__(None, None, None)
