"""A batch script run by a real bash, with stand-ins for SLURM and stagemix that write down what they are given."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

SECONDS = 60
_SRUN = """#!/bin/bash
trap 'echo USR1 >> "$SEEN/signals"; asked=1' USR1
trap 'echo TERM >> "$SEEN/signals"' TERM
printf '%s\\0' "$@" > "$SEEN/srun"
env -0 > "$SEEN/environment"
touch "$SEEN/started"
while :; do
    if [ -e "$SEEN/end" ]; then exit "$(cat "$SEEN/end")"; fi
    if [ -n "$asked" ]; then sleep 0.3; exit 75; fi
    sleep 0.02
done
"""
_PROGRAMS = {
    "srun": _SRUN,
    "scontrol": """#!/bin/bash
printf '%s\\0' "$@" >> "$SEEN/scontrol"
[ "$1 $2" = "show hostnames" ] && printf 'first\\nsecond\\n'
[ "$1 $2" = "show node" ] && echo 'NodeName=first NodeAddr=127.0.0.9 NodeHostName=x'
exit 0
""",
    "squeue": """#!/bin/bash
[ -e "$SEEN/squeue-says" ] && cat "$SEEN/squeue-says" || date -d '2031-05-06 07:08:09' +%Y-%m-%dT%H:%M:%S
""",
    "scancel": """#!/bin/bash
printf '%s\\0' "$@" >> "$SEEN/scancel"
""",
    "getent": "#!/bin/bash\nexit 2\n",
    "git": "#!/bin/bash\nexit 0\n",
    # the Python of the script: what it is asked to run, and the exit code of `requeue`
    "python": """#!/bin/bash
if [ "$4" = requeue ]; then printf '%s\\0' "$@" > "$SEEN/requeue"; exit "$(cat "$SEEN/requeue-says" || echo 0)"; fi
exit 0
""",
}


class Batch:
    """One run of a script; `seen` is the folder in which the stand-ins write."""

    def __init__(self, folder: Path, script: str, **environment: str) -> None:
        self.seen = folder / "seen"
        programs = folder / "bin"
        for made in (self.seen, programs):
            made.mkdir(parents=True, exist_ok=True)
        for name, text in _PROGRAMS.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self.file = folder / "script"
        self.file.write_text(script)
        self._environment = {
            "PATH": f"{programs}:/usr/bin:/bin",
            "SEEN": str(self.seen),
            "SLURM_JOB_ID": "4321",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_ON_NODE": "7",
            "SLURM_CPUS_PER_TASK": "3",
            **environment,
        }
        self._process: subprocess.Popen[str] | None = None

    def start(self, sign: str = "started") -> Batch:
        """Starts it and waits until srun runs, or until another file is in `seen`."""
        self._process = subprocess.Popen(
            ["bash", str(self.file)],
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        limit = time.monotonic() + SECONDS
        while not (self.seen / sign).exists():
            assert self._process.poll() is None, self._process.communicate()[0]
            assert time.monotonic() < limit, f"{sign}: never came to be"
            time.sleep(0.01)
        return self

    def send(self, number: signal.Signals) -> None:
        """To the script alone, as SLURM does with B:."""
        assert self._process is not None
        os.kill(self._process.pid, number)

    def end_step(self, code: int) -> None:
        """srun ends with this code."""
        aside = self.seen / "end.tmp"
        aside.write_text(str(code))
        aside.rename(self.seen / "end")

    def wait(self) -> tuple[int, str]:
        """Exit code and output of the script."""
        assert self._process is not None
        try:
            said = self._process.communicate(timeout=SECONDS)[0]
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            raise
        return self._process.returncode, said

    def words(self, name: str) -> list[str]:
        """What a stand-in was called with; [] where it was not."""
        path = self.seen / name
        return path.read_bytes().decode().split("\0")[:-1] if path.exists() else []

    def signals(self) -> list[str]:
        """Signals that srun got, in order."""
        path = self.seen / "signals"
        return path.read_text().split() if path.exists() else []

    def variable(self, name: str) -> str | None:
        """Of the environment in which srun was called."""
        pairs = dict(pair.partition("=")[::2] for pair in self.words("environment"))
        return pairs.get(name)


def submitting_stand_ins(folder: Path) -> Path:
    """sbatch and squeue in a new folder, which is given back. sbatch notes its words in `calls`, gives 101, 102, … and
    refuses with what is in `refuses`; squeue says what is in `queue`."""
    folder.mkdir()
    programs = {
        "sbatch": 'printf "%s\\0" "$@" >> $HERE/calls; printf "\\n" >> $HERE/calls\n'
        "[ -e $HERE/refuses ] && { cat $HERE/refuses >&2; exit 1; }\n"
        "n=$(($(cat $HERE/last 2> /dev/null || echo 100) + 1)); echo $n > $HERE/last; echo $n\n",
        "squeue": "cat $HERE/queue 2> /dev/null\n",
    }
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\nHERE={shlex.quote(str(folder))}\n{text}")
        (folder / name).chmod(0o755)
    return folder


def submissions(folder: Path) -> list[list[str]]:
    """The words of each call of sbatch."""
    path = folder / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.split("\0")[:-1] for line in lines]


def directives(script: str) -> dict[str, str]:
    """The #SBATCH lines of a script, read as a shell reads words."""
    found = {}
    for line in script.splitlines():
        if line.startswith("#SBATCH --"):
            name, _, value = " ".join(shlex.split(line.removeprefix("#SBATCH --"))).partition("=")
            found[name] = value
    return found
