"""Jobs around a run, by the launcher: preprocessing as an array with its merge, and evaluation beside training."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from preprocessing.corpora import digests, read_indexed, texts_of, write_jsonl
from slurm.cluster import SlurmCluster, skip_without_slurm
from slurm.jobs import launch, write_config
from tiny_run import CONFIG, ROOT
from trainer.stand_in import StandIn

from megatron.commands.frame import run_command
from megatron.commands.preprocess_data import main as preprocess_data

pytestmark = [pytest.mark.timeout(600), pytest.mark.long]
LIMIT = 240


@pytest.fixture(scope="module")
def cluster(warm: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    skip_without_slurm()
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), environment=warm) as running:
        yield running


def submitted(said: str) -> list[str]:
    return re.findall(r"submitted (\d+)", said)


def log_of(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("*.log")))


def by_launcher(cluster: SlurmCluster, words: list[str], folder: Path) -> list[str]:
    options = ("--array=1-3", "--time=10", "--program=stagemix", f"--folder={folder}")
    return submitted(cluster.run("stagemix", "launch_slurm", *options, "--", "preprocess_data", *words))


def by_examples(cluster: SlurmCluster, words: list[str], folder: Path) -> list[str]:
    examples, options = ROOT / "examples" / "slurm", ("--cpus-per-task=1", f"--output={folder}/%A_%a.log", "--time=10")
    shards = cluster.sbatch(examples / "preprocess_array.sbatch", *options, "--array=1-3", arguments=tuple(words))
    after = (f"--dependency=afterok:{shards}", "--kill-on-invalid-dep=yes")
    merge = cluster.sbatch(examples / "merge.sbatch", *options, *after, arguments=tuple(words[-2:]))
    return [shards, merge]


@pytest.mark.parametrize("submit", [by_launcher, by_examples])
def test_shards_of_an_array_merge_to_the_bytes_of_one_process(
    cluster: SlurmCluster, tmp_path: Path, submit: Callable[[SlurmCluster, list[str], Path], list[str]]
) -> None:
    for seed in range(3):
        write_jsonl(tmp_path / f"corpus-{seed}.jsonl", texts_of(seed, 100))
    words = ["--input", str(tmp_path / "corpus-*.jsonl"), "--tokenizer", "bytes", "--exact-duplicates"]
    assert run_command(preprocess_data, [*words, "--workers", "1", "--output-prefix", str(tmp_path / "alone")]) == 0
    folder = tmp_path / "logs"
    folder.mkdir()
    shards, merge = submit(cluster, [*words, "--output-prefix", str(tmp_path / "shared")], folder)
    assert f"afterok:{shards}" in cluster.job(merge)["Dependency"]
    assert cluster.wait(merge, LIMIT) == "COMPLETED", f"{log_of(folder)}\n{cluster.log()}"
    assert digests(tmp_path / "shared") == digests(tmp_path / "alone")
    assert len(read_indexed(tmp_path / "shared")) > 100


def test_a_side_job_evaluates_each_checkpoint_that_is_due(cluster: SlurmCluster, tmp_path: Path) -> None:
    stand_in = StandIn(tmp_path)
    config = write_config(tmp_path, "run", f'{CONFIG}\n[evaluation]\ntasks = ["quiz"]\nwhere = "queue"\n')
    program = f"--env=TEST_STAND_IN={stand_in.folder / 'stand_in.py'}"
    job = launch(cluster, config, "--nodes=1", "--serve-evaluations", program)
    (side,) = [number for number in cluster.run("squeue", "--noheader", "--format=%i").split() if number != job.id]
    job.completes(LIMIT)
    assert cluster.wait(side, LIMIT) == "COMPLETED", f"{log_of(job.output / 'slurm')}\n{cluster.log(side)}"
    found = sorted(path.stem for path in (job.output / "evaluations").glob("step-*[0-9].json"))
    assert found == [f"step-{step:09d}" for step in (8, 14, 24)]
    assert stand_in.steps == [8, 14, 24]
