"""`stagemix study report`: a study's results as a page, Markdown and CSV, with what can be told from noise."""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

from megatron.commands.report import gather
from megatron.commands.study_action import Action, planned_study
from megatron.config.errors import EXIT_DONE, ConfigError, DataError
from megatron.metrics.report import render_report
from megatron.study.arms import arms_of
from megatron.study.node_config import node_folder, study_folder
from megatron.study.plan import PlannedStudy
from megatron.study.report_data import CHANGED, read_study
from megatron.study.report_writing import Written, write_study_report
from megatron.study.study_file import load_study

EPILOG = """\
examples:
  stagemix study report STUDY                          # into the study's folder, report/index.html
  stagemix study report STUDY --baseline balanced      # differences from another arm
  stagemix study report STUDY --arm balanced           # of some arms: into report-arms-balanced
  stagemix study report STUDY --arm 'share-*' --output shares
  stagemix study report STUDY --strict                 # fails where something is missing, for scripts

Reads what study run and study evaluate left: results, metrics and ledgers of the nodes. Writes index.html (one file,
works without network, light or dark), report.md, results.csv (every figure, long), table.csv (the tables with
intervals and p-values), plots/*.svg, diffs/*.html (ledgers beside the baseline's) and runs/*.html (each node's own
report). Links are relative: the study's folder can be moved. The same results give the same files, byte for byte.

Figures are means over seeds. Differences from the baseline have 95 % intervals from a paired bootstrap over items and
seeds, and Holm's p-values over the whole table. docs/studies.md says how to read them.

A report of some arms, or without some of study.seeds, never replaces the whole study's: without --output it goes into
a folder beside it that is called by what was chosen. Files of an earlier report in the same folder that the new one
does not have are removed, and named.

What is not trained or not evaluated is named, and the report is made of the rest.

exit codes: 0 done, also where something is missing · 2 the study cannot be carried out as written, or no such arm ·
3 results or evaluation files are damaged; with --strict also where something is missing, or words of [report] match no
figure · 74 disk (docs/exit-codes.md)
"""


def _arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "--output", type=Path, metavar="DIR", help="default report in the study's folder, or report-CHOICE"
    )
    one.add_argument("--baseline", metavar="ARM", help="the arm to compare with; default study.baseline")
    one.add_argument("--strict", action="store_true", help="exit with 3 where something is missing; files are written")
    one.add_argument(
        "--no-run-reports", action="store_true", help="leave out runs/*.html, which long runs make large and slow"
    )


def _report(args: argparse.Namespace) -> int:
    chosen = list(args.arm)
    _add_baseline(args)
    planned = planned_study(args)
    _refuse_strange_seeds(args, planned)
    output = args.output or _folder(args, planned, chosen)
    if output.is_file():
        raise ConfigError(f"--output {output}: is a file: name a folder")
    report = read_study(planned, args.baseline)
    written = write_study_report(report, output, None if args.no_run_reports else _run_report)
    _show(written)
    wrong = [*written.missing, *(note for note in written.notes if note.startswith("report.") or CHANGED in note)]
    if args.strict and wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise DataError(
            f"{args.study}: incomplete: {wrong[0]}{more}: stagemix study run trains and evaluates what is missing"
        )
    return EXIT_DONE


def _add_baseline(args: argparse.Namespace) -> None:
    """Some arms are shown beside the baseline, whether or not it is one of them."""
    baseline = args.baseline or (load_study(args.study).words.study.baseline if args.arm else None)
    if args.arm and baseline is not None and baseline not in args.arm:
        args.arm = [*args.arm, baseline]


def _folder(args: argparse.Namespace, planned: PlannedStudy, chosen: list[str]) -> Path:
    """Where the report goes by default: of all arms and at least the study's own seeds into report/; of a part of them
    into a folder called by it, so that the whole report stays."""
    whole = study_folder(planned).report
    parts = []
    if set(planned.arms) != set(arms_of(planned.study)):
        parts.append(f"arms-{'+'.join(chosen)}")
    if set(load_study(args.study).words.study.seeds) - set(planned.study.words.study.seeds):
        parts.append(f"seeds-{'+'.join(map(str, planned.study.words.study.seeds))}")
    if not parts:
        return whole
    words = "-".join(parts)
    name = "".join(letter if letter.isalnum() or letter in "-_.+" else "_" for letter in words)[:80]
    if name != words:  # other patterns may look alike
        name += f"-{hashlib.sha256(words.encode()).hexdigest()[:6]}"
    return whole.with_name(f"{whole.name}-{name}")


def _refuse_strange_seeds(args: argparse.Namespace, planned: PlannedStudy) -> None:
    """Raises ConfigError for a seed that is not the study's and with which nothing was ever begun."""
    own = load_study(args.study).words.study.seeds
    nodes = planned.graph.nodes.values()
    begun = {node.seed for node in nodes if node_folder(planned, node.id).path.is_dir()}
    if strange := [seed for seed in args.seeds if seed not in own and seed not in begun]:
        raise ConfigError(
            f"--seeds {strange[0]}: nothing was trained with this seed, and study.seeds are "
            f"{', '.join(map(str, own))}: stagemix study run --seeds {strange[0]} trains it"
        )


def _run_report(run: Path, evaluations: list[Path]) -> str:
    return render_report(gather(run, evaluations))


def _show(written: Written) -> None:
    if written.missing:
        print(f"incomplete: {len(written.missing)} missing")
        for words in written.missing:
            print(f"  {words}")
    for words in written.headline:
        print(f"- {words}")
    for words in written.notes:
        print(f"note: {words}", file=sys.stderr)
    if written.removed:
        more = f" and {len(written.removed) - 6} more" if len(written.removed) > 6 else ""
        names = ", ".join(written.removed[:6])
        print(f"removed what an earlier report had there and this one has not: {names}{more}")
    print(f"{written.page} and {written.files - 1} files beside it")


ACTION = Action(
    "Makes the study's report: tables with what is told from noise, plots, ledgers, links.", EPILOG, _arguments, _report
)
