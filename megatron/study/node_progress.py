"""How far a node that is being trained is, from the end of its metrics.jsonl."""

from __future__ import annotations

import time

from megatron.config.quantities import format_count
from megatron.launch.run_checkpoints import newest_checkpoints
from megatron.metrics.row_tail import pace_of, read_tail
from megatron.study.node_config import node_folder
from megatron.study.plan import PlannedStudy
from megatron.study.steps import TrainStep
from megatron.study.verification import skipped_updates

_BYTES = 64 * 2**10
_EVERY_SECONDS = 1.0


class NodeProgress:
    """step, steps: of the node's own stage · tokens, of total: trained of its own · done: all of them are."""

    def __init__(self, planned: PlannedStudy, name: str) -> None:
        self._planned, self._name = planned, name
        step = planned.graph.nodes[name].step
        assert isinstance(step, TrainStep)
        self._stage = step.stage
        self._folder = node_folder(planned, name).path
        self.step, self.steps = 0, step.stage.steps
        self.tokens, self.total = 0, step.stage.tokens
        self.loss: float | None = None
        self.tokens_per_second: float | None = None
        self._done = False
        self._looked = 0.0
        newest = next((one for one in newest_checkpoints(self._folder)[0] if not one.fault), None)
        if newest is not None:  # rows beyond it are trained again
            self._at(newest.step, int(newest.state.get("consumed_tokens", 0)))

    @property
    def done(self) -> bool:
        """Whether it is trained."""
        return self._done

    @done.setter
    def done(self, value: bool) -> None:
        self._done = value
        if value:
            self.step, self.tokens = self.steps, self.total

    @property
    def left(self) -> int:
        """Tokens that are left."""
        return self.total - self.tokens

    def read(self) -> None:
        """Looks again, once a second at most."""
        now = time.monotonic()
        if now - self._looked < _EVERY_SECONDS or self._done:
            return
        self._looked = now
        try:
            tail = read_tail(self._folder / "metrics.jsonl", None, _BYTES, _BYTES)
        except OSError:
            return
        if not tail.steps:
            return
        self._at(int(tail.last["step"]), int(tail.last["consumed_tokens"]))
        pace = pace_of(tail.steps)
        self.loss, self.tokens_per_second = pace.loss, pace.tokens_per_second

    def words(self) -> str:
        """What it came to, to be added to a line."""
        loss = "" if self.loss is None else f", loss {self.loss:.4f}"
        skipped, steps = skipped_updates(self._planned, self._name)
        lost = f", {skipped:,} of {steps:,} steps without an update" if skipped else ""
        return f": {format_count(self.total)} tokens{loss}{lost}"

    def _at(self, step: int, tokens: int) -> None:
        stage = self._stage
        self.step = min(max(0, step - stage.start_step), self.steps)
        self.tokens = min(max(0, tokens - stage.start_token), self.total)
