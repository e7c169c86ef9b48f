"""What every job that trains says of its time and at its top, be it one run's, an array's or a study's node."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from megatron.commands.launch_checks import CheckedRun
from megatron.commands.launch_places import written
from megatron.config.errors import ConfigError
from megatron.launch.slurm_options import SlurmOptions
from megatron.launch.slurm_script import Head, Size
from megatron.launch.slurm_words import time_words
from megatron.launch.stop_lead import StopLead, stop_lead

START_SECONDS = 10
"""That a start of ranks is taken to need at least, from the batch script's first line to the first step."""


def lead_in(runs: Collection[CheckedRun], options: SlurmOptions, size: Size, limit: int | None) -> StopLead:
    """How long before the end runs are asked to stop. limit: seconds that they are given; None: as long as they like.

    Raises ConfigError where the time is so short that no step could ever begin.
    """
    if options.lead:
        lead = StopLead(options.lead, "as --lead says")
    else:
        leads = [stop_lead(run.output, size.nodes, run.checkpoint_bytes) for run in runs]
        lead = max(leads, key=lambda one: one.seconds)
    if limit is not None and lead.seconds >= limit:
        raise ConfigError(
            f"--time {options.time}: the run is asked to stop {lead.seconds} s before the end ({lead.why}), and the "
            f"whole time is {time_words(limit)}: give more time (hours:minutes:seconds), or --lead SECONDS"
        )
    margin = max(run.config.health.end_margin_seconds for run in runs)
    if limit is not None and limit <= margin + START_SECONDS:
        raise ConfigError(
            f"--time {options.time}: {limit} s in all, of which the run keeps the last {margin} s free "
            f"(health.end_margin_seconds), and its start takes {START_SECONDS} s or more: it would stop before its "
            f"first step, again and again: give more time, or lower health.end_margin_seconds"
        )
    return lead


def training_head(
    name: str,
    run: CheckedRun,
    size: Size,
    lead: StopLead,
    limit: int | None,
    excluded: Sequence[str],
    said: str,
    requeue: bool,
    array: str | None = None,
) -> Head:
    """The top of a batch script. run: the one, or the first of several; said: the command that the script is for."""
    signal = None
    if limit is not None:
        why = f"SIGUSR1 to this script alone (B:) {lead.seconds} s before the time is over: {lead.why}"
        signal = (f"B:USR1@{lead.seconds}", why)
    return Head(
        name=name,
        lines=[written(said), f"Layout: {run.layout} over {run.processes} processes."],
        size=size,
        requeue=requeue,
        signal=signal,
        array=array,
        excluded=excluded,
    )
