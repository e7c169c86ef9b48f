"""Batch scripts of a study: a node's training by the launcher's own script, the rest as jobs of one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron.commands.launch_checks import CheckedRun, check_config
from megatron.commands.launch_places import place_paths, time_limit, written
from megatron.commands.launch_training import lead_in, training_head
from megatron.config.errors import StagemixError
from megatron.launch.data_script import DataJob, data_script
from megatron.launch.slurm_options import SlurmOptions
from megatron.launch.slurm_script import Head, Size
from megatron.launch.slurm_submit import next_script
from megatron.launch.training_script import TrainingJob, training_script
from megatron.study.node_config import end_checkpoint, node_config, node_folder, node_words, study_folder
from megatron.study.node_state import title
from megatron.study.plan import PlannedStudy
from megatron.study.slurm_nodes import JobKey, comment_of
from megatron.study.slurm_section import side_options
from megatron.study.steps import AverageStep

MORE_KEPT = 10
"""Checkpoints of a node of which an average needs the newest: so many more are kept, since each start of its job may
leave one that is none of the average's."""


@dataclass
class StudyScripts:
    """Writes them. excluded: nodes that failed in the study before, besides the user's · said: the command line ·
    choice: --arm and --seeds of it, for the report; seeds: --seeds alone, for evaluations · notes: what checks said."""

    planned: PlannedStudy
    options: SlurmOptions
    size: Size
    said: str
    dry_run: bool = False
    excluded: Sequence[str] = ()
    choice: Sequence[str] = ()
    seeds: Sequence[str] = ()
    notes: list[str] = field(default_factory=list)

    def check(self, name: str) -> CheckedRun:
        """A training node's run, as train would accept it. Raises ConfigError, DataError, ChangedPastError."""
        config = node_config(self.planned, name)
        path = node_folder(self.planned, name).config
        try:
            run = check_config(config, path, self.size.nodes * self.size.ranks, self.dry_run)
        except StagemixError as error:
            said = str(error).removeprefix(f"{path}: ")
            raise type(error)(f"{self.planned.study.path}: {title(self.planned.graph, name)}: {said}") from None
        self.notes += [note for note in run.notes if note not in self.notes]
        return run

    def side(self, task: str) -> SlurmOptions:
        """What a job of one process is given. Raises ConfigError."""
        words = self.planned.study.words
        device = words.results.device if task == "evaluate" else "cpu"
        return side_options(task, words.slurm, self.options, device)

    def folder_of(self, key: JobKey) -> Path:
        """Of a job's scripts and logs: that of a training node as if it had been launched by itself."""
        name, task = key
        return (
            node_folder(self.planned, name) if task == "train" else study_folder(self.planned)
        ).path.absolute() / "slurm"

    def file_of(self, key: JobKey) -> Path:
        """Where the next script of a job is to lie."""
        return next_script(self.folder_of(key), "-".join(filter(None, (key[1], key[0][:8] * (key[1] != "train")))))

    def text_of(self, key: JobKey) -> str:
        """The script. Raises ConfigError."""
        name, task = key
        if task == "train":
            return self._training(name)
        options = self._own(key, self.side(task))
        time_limit(options)
        size = Size(1, 1, 1, options.gpus_per_node or 0, options.cpus_per_task)
        lines = [written(self.said), self._about(key)]
        # what one process does is begun again where a node was lost: it leaves its work whole, or not at all
        head = Head(self._job_name(key), lines, size, requeue=options.requeue is not False)
        return data_script(DataJob(self._words(key)), head, options, place_paths(self.folder_of(key)))

    def _training(self, name: str) -> str:
        key: JobKey = (name, "train")
        run, node = self.check(name), self.planned.graph.nodes[name]
        options, limit = self._own(key, self.options), time_limit(self.options)
        lead = lead_in([run], options, self.size, limit)
        requeue = options.requeue is not False
        head = training_head(self._job_name(key), run, self.size, lead, limit, self.excluded, self.said, requeue)
        head = dataclasses.replace(head, lines=[*head.lines, self._about(key)])
        begins = end_checkpoint(self.planned, node.parents[0]).absolute() if node.parents else None
        averaged = any(
            isinstance(other.step, AverageStep) and other.step.last and name in other.parents
            for other in self.planned.graph.nodes.values()
        )
        job = TrainingJob(
            configs={None: run.path.absolute()},
            outputs={None: run.output.absolute()},
            overrides=[f"checkpoint.keep={run.config.checkpoint.keep + MORE_KEPT}"] if averaged else [],
            max_requeues=options.max_requeues,
            shutdown_seconds=lead.seconds,
            begins_at=begins,
        )
        return training_script(job, head, options, place_paths(self.folder_of(key)))

    def _words(self, key: JobKey) -> list[str]:
        name, task = key
        study = str(self.planned.study.path.absolute())
        if task == "evaluate":
            return ["study", "evaluate", study, "--node", name, *self.seeds]
        if task == "report":
            return ["study", "report", study, *self.choice]
        return node_words(self.planned, name)

    def _own(self, key: JobKey, options: SlurmOptions) -> SlurmOptions:
        """The options with the job's comment. What jobs wait for is said to sbatch, when it is known."""
        comment = comment_of(key, study_folder(self.planned).path, self.options.comment)
        return dataclasses.replace(options, comment=comment, dependency=None)

    def _job_name(self, key: JobKey) -> str:
        name, task = key
        label = f"{self.planned.graph.nodes[name].label}-{name[:8]}" if name else "report"
        parts = (self.planned.study.words.study.name, label, *((task,) if task in ("average", "evaluate") else ()))
        return "-".join(part.replace(" ", "-") for part in parts)

    def _about(self, key: JobKey) -> str:
        name, task = key
        if not name:
            return "The report of the whole study."
        node = self.planned.graph.nodes[name]
        return (
            f"Node {name} of the study, task {task}: {node.label}, seed {node.seed}, for arms {', '.join(node.arms)}."
        )
