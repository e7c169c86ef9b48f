"""The plain batch scripts in examples/slurm: bash reads them, and the one that trains does what the launcher's does."""

from __future__ import annotations

import re
import signal
import subprocess
import tomllib
from pathlib import Path

import pytest
from batch_stand_ins import Batch

from megatron.launch.slurm_options import SlurmOptions, checked_site, options_from, read_site
from megatron.launch.slurm_script import Head, Paths, Size
from megatron.launch.training_script import TrainingJob, training_script

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "slurm"
FILES = sorted(FOLDER.glob("*.sbatch"))


def code(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def options(text: str) -> set[str]:
    return {match[1] for match in re.finditer(r"^#SBATCH --([a-z-]+)", text, re.MULTILINE)}


def test_there_is_one_for_each_kind_of_job() -> None:
    names = ["evaluate", "export", "merge", "preprocess_array", "pretrain", "serve_evaluations"]
    assert [path.stem for path in FILES] == names


def test_the_example_of_a_site_is_read_whole() -> None:
    path = FOLDER / "site.toml"
    shown = re.sub(r"^# (?=\w+ = )", "", path.read_text(), flags=re.MULTILINE)
    assert options_from(checked_site(str(path), tomllib.loads(shown)), {}).module == ["cuda/12.8"]
    assert read_site(path).items() <= tomllib.loads(shown).items()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_bash_reads_it(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=60)
    lines = path.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert not any(line and not line.startswith("#") for line in lines[:last])  # sbatch stops reading at a command


def launched(folder: Path) -> str:
    head = Head("pretrain", [], Size(4, 8, 8, 8, 12), True, ("B:USR1@300", "why"))
    options = SlurmOptions(nodes=4, gpus_per_node=8, cpus_per_task=12, time="24:00:00", program="stagemix")
    job = TrainingJob({None: folder / "run.toml"}, {None: folder / "out"})
    return training_script(job, head, options, Paths(folder, folder, "python"))


def test_training_is_that_of_the_launcher(tmp_path: Path) -> None:
    plain, ours = (FOLDER / "pretrain.sbatch").read_text(), launched(tmp_path)
    assert options(plain) == options(ours) - {"chdir"}
    for beginning, end in (
        ("export SLURM_EXPORT_ENV", "export SRUN_CPUS"),
        ("export PYTHONUNBUFFERED", "export STAGEMIX_END_TIME"),
    ):
        parts = []
        for text in (plain, ours):
            lines = code(text)
            first = next(number for number, line in enumerate(lines) if line.startswith(beginning))
            last = next(number for number, line in enumerate(lines) if line.startswith(end))
            parts.append(lines[first : last + 1])
        assert parts[0] == parts[1]
    traps = [code(text)[:3] for text in (plain, ours)]
    assert traps[0] == traps[1] and traps[0][0].startswith("step=")  # before anything that takes time
    waits = [code(text)[code(text).index('if [ "$heard" ]; then') :] for text in (plain, ours)]
    kept = [[line for line in lines if not re.search(r"srun|train|requeue", line)] for lines in waits]
    assert kept[0] == kept[1]


def test_the_plain_one_trains_stops_and_is_requeued(tmp_path: Path) -> None:
    batch = Batch(tmp_path, "", SLURM_NTASKS_PER_NODE="8")
    stagemix = tmp_path / "bin" / "stagemix"
    stagemix.write_text('#!/bin/bash\nprintf \'%s\\0\' "$@" > "$SEEN/requeue"\nexit 0\n')
    stagemix.chmod(0o755)
    words = f"{FOLDER / 'pretrain.sbatch'} 'my run.toml' 'runs/my run' --set a=b"
    batch.file.write_text(f"set -- {words.partition(' ')[2]}\n{(FOLDER / 'pretrain.sbatch').read_text()}")
    batch.start().send(signal.SIGUSR1)
    assert batch.wait()[0] == 0
    assert batch.signals() == ["USR1"]
    assert batch.words("srun")[-5:] == ["stagemix", "train", "my run.toml", "--set", "a=b"]
    assert batch.words("requeue") == ["requeue", "runs/my run", "--code", "75"]
