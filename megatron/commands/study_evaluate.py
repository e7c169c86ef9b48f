"""`stagemix study evaluate`: exports and evaluates the nodes of a study that are trained."""

from __future__ import annotations

import argparse
import time

from megatron.commands.study_action import Action, planned_study
from megatron.config.errors import EXIT_CHECKPOINT, ConfigError
from megatron.study.damaged_checkpoints import damaged_words
from megatron.study.due_tasks import Task
from megatron.study.node_config import node_folder
from megatron.study.node_evaluation import evaluate_study
from megatron.study.node_parts import Evaluated
from megatron.study.plan import PlannedStudy

EPILOG = """\
examples:
  stagemix study evaluate STUDY                        # all that is trained and not yet evaluated
  stagemix study evaluate STUDY --node text --node 'balanced*/cooldown'
  stagemix study evaluate STUDY --node 1a2b3c4d --again

What is measured stands in [results] of the study (docs/studies.md): losses by source on held-out documents, suites of
`stagemix evaluate`, generated texts, a win rate against the baseline. Of each node: export/, a Hugging Face folder that
is proven; evaluation-SUITE.json; samples.jsonl; results.json with every figure. What is there for the same weights and
the same questions is not done again; what was asked differently, or trained again, is.

`stagemix study run` does this for each node when it is trained.

exit codes: 0 done, or nothing to do · 2 [results] cannot be carried out, or --node is unknown or not trained · 3 data
or prompts that are missing or wrong · 4 damaged checkpoint · 6 a library, a judge or walls for programs are not there ·
7 an export that is not equal to its checkpoint · 74 disk · 137 killed, for want of memory say; of several the first
(docs/exit-codes.md)
"""


def _arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "--node",
        action="append",
        default=[],
        metavar="NODE",
        help="an id or its first four characters or more, a label as arm/stage, an arm for its end, or a pattern of "
        "labels or arms; may be given again",
    )
    one.add_argument("--again", action="store_true", help="also what is done already")
    one.add_argument("--threads", type=int, default=0, metavar="N", help="of the arithmetic; default as the study says")


def _evaluate(args: argparse.Namespace) -> int:
    if args.threads < 0:
        raise ConfigError(f"--threads {args.threads}: at least 1; leave it out for what the study says")
    planned, began = planned_study(args), time.time()
    code = evaluate_study(planned, args.node, args.again, args.threads, lambda words: print(words, flush=True))
    if code == EXIT_CHECKPOINT:
        for words in damaged_words(planned, _failed(planned, began)):
            print(words, flush=True)
    return code


def _failed(planned: PlannedStudy, since: float) -> list[Task]:
    """Evaluations that failed over a checkpoint from then on, in unix seconds."""
    failures = {name: Evaluated(node_folder(planned, name)).failures_since(since) for name in planned.graph.nodes}
    over = [name for name, parts in failures.items() if any(code == EXIT_CHECKPOINT for code, _ in parts.values())]
    return [Task("evaluate", name) for name in over]


ACTION = Action("Exports and evaluates the nodes that are trained.", EPILOG, _arguments, _evaluate)
