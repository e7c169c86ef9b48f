"""The one door to TensorBoard."""

from __future__ import annotations

from pathlib import Path

from megatron.config.errors import UnavailableError
from megatron.metrics.sinks import Row, flat_numbers


class TensorBoardSink:
    """Event files under OUTPUT/tensorboard. `purge_step` hides rows of an earlier attempt beyond the resumed step."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UnavailableError(
                "log.tensorboard = true needs the package tensorboard, which is not installed here: "
                "pip install tensorboard, or set log.tensorboard = false"
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def write(self, row: Row) -> None:
        """Takes a row."""
        for name, number in flat_numbers(row).items():
            if name != "step":
                self._writer.add_scalar(name, number, int(row["step"]))

    def sync(self) -> None:
        """Hands the rows to the operating system."""
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()
