"""`stagemix study evaluate`: exports and evaluates the nodes of a study that are trained."""

from __future__ import annotations

import argparse

from megatron.commands.study_action import Action, planned_study
from megatron.config.errors import ConfigError
from megatron.study.node_evaluation import evaluate_study

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
    return evaluate_study(
        planned_study(args), args.node, args.again, args.threads, lambda words: print(words, flush=True)
    )


ACTION = Action("Exports and evaluates the nodes that are trained.", EPILOG, _arguments, _evaluate)
