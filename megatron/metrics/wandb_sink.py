"""The one door to Weights & Biases."""

from __future__ import annotations

from typing import Any

from megatron.config.errors import UnavailableError
from megatron.metrics.sinks import Row, flat_numbers


class WandbSink:
    """Sends every row's numbers to one run, which goes on under the same id after a resume."""

    def __init__(self, project: str, name: str, run_id: str, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UnavailableError(
                f"log.wandb_project = {project!r} needs the package wandb, which is not installed here: "
                "pip install wandb, or remove log.wandb_project"
            ) from error
        self._run = wandb.init(project=project, name=name, id=run_id, resume="allow", config=config)

    def write(self, row: Row) -> None:
        """Takes a row."""
        self._run.log(flat_numbers(row), step=int(row["step"]))

    def sync(self) -> None:
        """Nothing to do: metrics.jsonl is the durable record."""

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()
