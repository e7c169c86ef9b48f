"""A private SLURM on this one host, for tests: munged, slurmctld and a slurmd for each "node", all in the foreground,
below one folder, on free ports; several can run beside each other, as root or as a user.

Nodes are named node1, node2, … Each has as many CPUs (and, where asked for, GPUs) as tasks shall fit on it,
whatever the machine has. Partitions: `batch`, the default, and `urgent`, whose jobs preempt those of `batch`: they get
SIGTERM, GRACE_SECONDS later SIGKILL, and are requeued.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")
GRACE_SECONDS = 30
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
"""States of a job that is over; PREEMPTED is not among them, since such a job is requeued here."""

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={port}
FirstJobId={first_job}
AuthType=auth/munge
AuthInfo=socket={socket},cred_expire={credential}
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={spool}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n/slurmd.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,bf_resolution=1,sched_interval=2,sched_min_interval=0,batch_sched_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdParameters=config_overrides
KillWait={kill_wait}
OverTimeLimit=0
CompleteWait=0
InactiveLimit=0
BatchStartTimeout=20
MessageTimeout=20
SlurmdTimeout={node_timeout}
MinJobAge=86400
PropagateResourceLimits=NONE
TmpFS={folder}
{gres}NodeName=DEFAULT CPUs={cpus} RealMemory=4096{gpus} State=UNKNOWN
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 PriorityTier=1 GraceTime={grace} State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE DefaultTime=60 PriorityTier=10 PreemptMode=OFF State=UP
"""


def skip_without_slurm() -> None:
    """Skips the test, or the module that calls this, where SLURM's programs are not there."""
    if missing := [name for name in PROGRAMS if _program(name) is None]:
        pytest.skip(
            f"no {', '.join(missing)} on this machine: install slurm-wlm and munge (apt-get install slurm-wlm munge)",
            allow_module_level=True,
        )


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))


class SlurmCluster:
    """`with SlurmCluster(folder) as cluster`: the daemons run until the block ends; then nothing of theirs is left, no
    process of a job either.

    node_timeout: seconds after which a node that does not answer is down, and its jobs are requeued. gpus_per_node: a
    gres of empty files. kill_wait: seconds between SIGTERM and SIGKILL at the time limit. credential: at least so
    many seconds pass before a job that was requeued starts again. environment: variables for all that it runs.
    """

    def __init__(
        self,
        folder: Path,
        nodes: int = 2,
        tasks_per_node: int = 2,
        *,
        gpus_per_node: int = 0,
        node_timeout: int = 30,
        kill_wait: int = 15,
        credential: int = 5,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.node_names = [f"node{number}" for number in range(1, nodes + 1)]
        self._sizes = {"cpus": tasks_per_node, "node_timeout": node_timeout, "kill_wait": kill_wait}
        self._credential = credential
        self._gpus = gpus_per_node
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._short: Path | None = None
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH_"))}
        self.env |= {"SLURM_CONF": str(folder / "slurm.conf"), **(environment or {})}

    # What it runs

    def run(self, *words: str, check: bool = True, seconds: float = 60) -> str:
        """A program of SLURM, or any other, in the cluster's environment; what it printed."""
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=seconds)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(words)} gave {done.returncode}:\n{done.stdout}{done.stderr}\n{self.log()}")
        return done.stdout

    def sbatch(self, file: Path, *words: str, arguments: tuple[str, ...] = ()) -> str:
        """Submits a batch script; the job's id. words: sbatch's options; arguments: the script's."""
        return self.run("sbatch", "--parsable", *words, str(file), *arguments).strip().split(";")[0]

    def scontrol(self, *words: str) -> str:
        """What scontrol printed."""
        return self.run("scontrol", *words)

    def job(self, job: str) -> dict[str, str]:
        """`scontrol show job` by field. job: an id, or ARRAYJOB_TASK."""
        shown = self.scontrol("--oneliner", "show", "job", job).splitlines()[0]
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED and so on."""
        return self.job(job)["JobState"]

    def wait(self, job: str, seconds: float, states: tuple[str, ...] = ENDED) -> str:
        """Waits until the job is in one of the states, by default over; that state. AssertionError after `seconds`."""
        end = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            if time.monotonic() > end:
                raise AssertionError(f"job {job} is {state} after {seconds} seconds:\n{self.job(job)}\n{self.log()}")
            time.sleep(0.25)
        return state

    def log(self, job: str = "") -> str:
        """The ends of all daemons' logs, for messages; only the lines about a job where it is named."""
        logs = {"munged": "munged.log", "slurmctld": "slurmctld.log"}
        logs |= {name: f"{name}/slurmd.log" for name in self.node_names}
        # What a daemon prints it logs, too, but for what comes before its log is open.
        files = [
            self.folder / log if (self.folder / log).exists() else self._printed(name) for name, log in logs.items()
        ]
        shown = {path: _tail(path, job) for path in files if path.exists()}
        return "\n".join(f"--- {path}\n{text}" for path, text in shown.items() if text)

    def _printed(self, name: str) -> Path:
        return self.folder / f"{name}.printed"

    # Nodes

    def start_node(self, name: str) -> None:
        """Starts a node's daemon, for instance again after `lose_node`."""
        assert self._short is not None
        for folder in (self.folder / name, self._short / name):  # its log; its spool, where sockets are made
            folder.mkdir(parents=True, exist_ok=True)
        self._start(name, "slurmd", "-D", "-N", name, "-f", self.env["SLURM_CONF"], node=name)

    def lose_node(self, name: str) -> None:
        """Kills a node's daemon and all that runs on it at once, as a power cut would."""
        self._end(name, signal.SIGKILL)
        self._end_processes(name)

    def processes(self, node: str | None = None) -> list[int]:
        """Ids of processes of this cluster's jobs and their step daemons: on one node, or on all."""
        found, daemons = [], {daemon.pid for daemon in self._daemons.values()}
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal() and int(folder.name) not in daemons:
                variables = _environment(folder)
                mine = variables.get("SLURM_CONF") == self.env["SLURM_CONF"]
                of_a_node = variables.get("SLURMD_NODENAME") or variables.get("TEST_CLUSTER_NODE")
                if mine and of_a_node is not None and node in (None, of_a_node):
                    found.append(int(folder.name))
        return found

    def tasks(self, job: str) -> dict[int, int]:
        """Process ids of a job step's tasks by SLURM_PROCID, without what they have started themselves."""
        found = {}
        for pid in self.processes():
            variables = _environment(Path("/proc") / str(pid))
            of_the_job = variables.get("SLURM_JOB_ID") == job and variables.get("SLURM_STEP_ID", "").isdecimal()
            if of_the_job and _name(_parent(pid)).startswith("slurmstepd"):
                found[int(variables["SLURM_PROCID"])] = pid
        return found

    def ranks(self, job: str) -> dict[int, int]:
        """Process ids by RANK of what torchruns in a job have started."""
        found = {}
        for pid in self.processes():
            variables, before = (_environment(Path(f"/proc/{process}")) for process in (pid, _parent(pid)))
            if variables.get("SLURM_JOB_ID") == job and "RANK" in variables and "RANK" not in before:
                found[int(variables["RANK"])] = pid
        return found

    # Beginning and end

    def __enter__(self) -> SlurmCluster:
        try:
            self._begin()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in reversed(list(self._daemons)):  # the nodes before the controller, munge last
            self._end(name, signal.SIGKILL if name in self.node_names else signal.SIGTERM)
            if name == "slurmctld":
                self._end_processes()
        self._end_processes()
        if self._short is not None:
            shutil.rmtree(self._short, ignore_errors=True)

    def _end_processes(self, node: str | None = None) -> None:
        """Kills until none is left: they may be starting others at this very moment."""
        end = time.monotonic() + 10
        while (left := self.processes(node)) and time.monotonic() < end:
            for pid in left:
                _kill(pid)
            time.sleep(0.05)

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "state").mkdir(exist_ok=True)
        # A socket's path has 107 letters at most, and pytest's folders are long. Anybody must be able to enter it.
        self._short = Path(tempfile.mkdtemp(prefix="munge-", dir="/tmp"))
        self._short.chmod(0o755)
        ports = _free_ports(1 + len(self.node_names))
        self._write_config(self._short / "socket", ports)
        key = self.folder / "munge.key"
        key.write_bytes(random.randbytes(128))
        key.chmod(0o600)
        words = [f"--{name}={path}" for name, path in self._munge_files(key).items()]
        self._start("munged", "munged", "--foreground", "--force", *words)
        self._until(lambda: (self._short or Path()).joinpath("socket").is_socket(), "munged")
        self._start("slurmctld", "slurmctld", "-D", "-i", "-f", self.env["SLURM_CONF"])
        for name in self.node_names:
            self.start_node(name)
        self._until(self._all_idle, "slurmctld")

    def _munge_files(self, key: Path) -> dict[str, Path]:
        assert self._short is not None
        files = {"log-file": "munged.log", "seed-file": "munged.seed"}
        found = {name: self.folder / file for name, file in files.items()}
        return {"key-file": key, "socket": self._short / "socket", "pid-file": self._short / "pid", **found}

    def _write_config(self, munge_socket: Path, ports: list[int]) -> None:
        host = socket.gethostname().split(".")[0]
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port}"
            for name, port in zip(self.node_names, ports[1:], strict=True)
        ]
        gpus = self._gpus
        values: dict[str, object] = {"host": host, "user": getpass.getuser(), "port": ports[0], "socket": munge_socket}
        # Batch scripts take the ranks' port from the job's id: clusters beside each other must not count alike.
        values |= {"first_job": 50 * random.SystemRandom().randrange(1, 190)}
        values |= {"folder": self.folder, "nodes": "\n".join(nodes), "grace": GRACE_SECONDS}
        values |= {"credential": self._credential, "gpus": f" Gres=gpu:{gpus}" if gpus else ""}
        words = CONFIG.format(
            **self._sizes, **values, spool=munge_socket.parent, gres="GresTypes=gpu\n" if gpus else ""
        )
        (self.folder / "slurm.conf").write_text(words)
        if gpus:
            devices = [self.folder / f"gpu{number}" for number in range(gpus)]
            for device in devices:
                device.touch()
            (self.folder / "gres.conf").write_text("".join(f"Name=gpu File={device}\n" for device in devices))

    def _all_idle(self) -> bool:
        states = self.run("sinfo", "--noheader", "--Node", "--format=%T", check=False).split()
        return bool(states) and all(state == "idle" for state in states)

    def _start(self, name: str, program: str, *words: str, node: str = "") -> None:
        path = _program(program)
        assert path is not None, program
        variables = self.env | ({"TEST_CLUSTER_NODE": node} if node else {})
        with self._printed(name).open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                [path, *words], env=variables, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )

    def _end(self, name: str, number: int) -> None:
        daemon = self._daemons.pop(name, None)
        if daemon is None:
            return
        for sent in (number, signal.SIGKILL):
            daemon.send_signal(sent)
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(5)
                return

    def _until(self, condition: object, daemon: str, seconds: float = 60) -> None:
        assert callable(condition)
        end = time.monotonic() + seconds
        while not condition():
            if (code := self._daemons[daemon].poll()) is not None:
                raise AssertionError(f"{daemon} ended with {code}:\n{self.log()}")
            if time.monotonic() > end:
                raise AssertionError(f"the cluster is not ready after {seconds} seconds:\n{self.log()}")
            time.sleep(0.1)


def _tail(path: Path, job: str) -> str:
    lines = path.read_text(errors="replace").splitlines()
    about = re.compile(rf"\[{job}\.|JobId={job}\b|StepId={job}\b|job {job}\b" if job else "")
    return "\n".join([line for line in lines if about.search(line) and "pmix" not in line][-60:])


def _environment(process: Path) -> dict[str, str]:
    try:
        words = (process / "environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # it has ended, or is another user's
        return {}
    return dict(word.split("=", 1) for word in words if "=" in word)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, between those of jobs' ranks and those that the system gives to connections."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(30_000, 32_768)
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found
