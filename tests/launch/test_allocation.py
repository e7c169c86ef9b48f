"""What SLURM's variables say of a job; they are named as in sbatch(1), OUTPUT ENVIRONMENT VARIABLES."""

from __future__ import annotations

import pytest

from megatron.config.errors import ConfigError
from megatron.launch.allocation import end_time, job_of

ARRAY_TASK = {
    "SLURM_JOB_ID": "12",
    "SLURM_JOB_NAME": "pretrain",
    "SLURM_RESTART_COUNT": "3",
    "SLURM_ARRAY_JOB_ID": "11",
    "SLURM_ARRAY_TASK_ID": "0",
    "SLURM_JOB_NODELIST": "node[1-4,7]",
    "SLURM_JOB_PARTITION": "long",
    "SLURM_CLUSTER_NAME": "c1",
}


def test_a_job_by_its_variables() -> None:
    assert job_of(ARRAY_TASK) == {
        "id": "12",
        "name": "pretrain",
        "restarts": 3,
        "array_job": "11",
        "array_task": "0",
        "nodes": "node[1-4,7]",
        "partition": "long",
        "cluster": "c1",
    }
    assert job_of({"SLURM_JOB_ID": "12"}) == {"id": "12"}
    assert job_of({}) == {} and job_of({"SLURM_JOB_ID": "", "SLURM_CLUSTER_NAME": "c1"}) == {}


def test_the_end_of_the_allocation() -> None:
    ours, slurms = {"STAGEMIX_END_TIME": "1700000000"}, {"SLURM_JOB_END_TIME": "1800000000"}
    assert end_time({}) is None
    assert end_time(slurms) == 1.8e9
    assert end_time({**ours, **slurms}) == 1.7e9
    assert end_time({"STAGEMIX_END_TIME": " ", **slurms}) == 1.8e9
    assert end_time({"STAGEMIX_END_TIME": "0", **slurms}) is None, "0 says: never mind the time"


@pytest.mark.parametrize("words", ["tomorrow", "-5", "nan", "inf", "2026-01-01T00:00:00", "1e999"])
@pytest.mark.parametrize("name", ["STAGEMIX_END_TIME", "SLURM_JOB_END_TIME"])
def test_what_is_no_time_is_refused_by_name(name: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        end_time({name: words})
    assert name in str(error.value) and repr(words) in str(error.value) and "STAGEMIX_END_TIME=0" in str(error.value)
