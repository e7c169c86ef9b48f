"""What SLURM says of the job that a process belongs to: which one it is, on which nodes, and when its time is over.

The only reader of SLURM's variables about an allocation; those about a process's rank are read by `parallel/mesh.py`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from megatron.config.errors import ConfigError

END_TIME = "STAGEMIX_END_TIME"
"""Unix seconds at which the allocation ends, exported by batch scripts; 0: none, whatever SLURM says."""
_SLURM_END_TIME = "SLURM_JOB_END_TIME"
_NAMES = {
    "id": "SLURM_JOB_ID",
    "name": "SLURM_JOB_NAME",
    "restarts": "SLURM_RESTART_COUNT",
    "array_job": "SLURM_ARRAY_JOB_ID",
    "array_task": "SLURM_ARRAY_TASK_ID",
    "nodes": "SLURM_JOB_NODELIST",
    "partition": "SLURM_JOB_PARTITION",
    "cluster": "SLURM_CLUSTER_NAME",
}


def job_of(environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The job that these variables, this process's where none are given, tell of; {} outside SLURM.

    Words, as SLURM writes them ("nodes" is "node[1-4,7]"), but "restarts", a number: how often it was requeued. Keys
    that SLURM did not set are absent: "restarts" before the first requeue, "array_…" where the job is of no array.
    """
    environ = os.environ if environ is None else environ
    if not environ.get(_NAMES["id"]):
        return {}
    job: dict[str, Any] = {key: environ[name] for key, name in _NAMES.items() if environ.get(name)}
    if "restarts" in job:
        job["restarts"] = int(job["restarts"]) if job["restarts"].isdecimal() else 0
    return job


def end_time(environ: Mapping[str, str] | None = None) -> float | None:
    """When the allocation ends, in unix seconds; None where nothing says so. Raises ConfigError for what is no time."""
    environ = os.environ if environ is None else environ
    for name in (END_TIME, _SLURM_END_TIME):
        words = environ.get(name, "").strip()
        if not words:
            continue
        try:
            seconds = float(words)
        except ValueError:
            seconds = math.nan
        if not (0 <= seconds < math.inf):
            raise ConfigError(
                f"environment variable {name} is {words!r}: it says when the allocation ends, in seconds since 1970 "
                f"(date +%s): correct what exports it, or export {END_TIME}=0 to train without looking at the time"
            )
        return seconds or None
    return None
