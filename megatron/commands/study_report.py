"""`stagemix study report`: a study's results as a page, Markdown and CSV, with what can be told from noise."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron.commands.report import gather
from megatron.commands.study_action import Action, planned_study
from megatron.config.errors import EXIT_DONE, ConfigError, DataError
from megatron.metrics.report import render_report
from megatron.study.node_config import study_folder
from megatron.study.report_data import read_study
from megatron.study.report_writing import Written, write_study_report
from megatron.study.study_file import load_study

EPILOG = """\
examples:
  stagemix study report STUDY                          # into the study's folder, report/index.html
  stagemix study report STUDY --baseline balanced      # differences from another arm
  stagemix study report STUDY --arm 'share-*' --output shares
  stagemix study report STUDY --strict                 # fails where something is missing, for scripts

Reads what study run and study evaluate left: results, metrics and ledgers of the nodes. Writes index.html (one file,
works without network, light or dark), report.md, results.csv (every figure, long), table.csv (the tables with
intervals and p-values), plots/*.svg, diffs/*.html (ledgers beside the baseline's) and runs/*.html (each node's own
report). Links are relative: the study's folder can be moved. The same results give the same files, byte for byte.

Figures are means over seeds. Differences from the baseline have 95 % intervals from a paired bootstrap over items and
seeds, and Holm's p-values over the whole table. docs/studies.md says how to read them.

What is not trained or not evaluated is named, and the report is made of the rest.

exit codes: 0 done, also where something is missing · 2 the study cannot be carried out as written, or no such arm ·
3 results or evaluation files are damaged; with --strict also where something is missing, or words of [report] match no
figure · 74 disk (docs/exit-codes.md)
"""


def _arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("--output", type=Path, metavar="DIR", help="default report in the study's folder")
    one.add_argument("--baseline", metavar="ARM", help="the arm to compare with; default study.baseline")
    one.add_argument("--strict", action="store_true", help="exit with 3 where something is missing; files are written")
    one.add_argument(
        "--no-run-reports", action="store_true", help="leave out runs/*.html, which long runs make large and slow"
    )


def _report(args: argparse.Namespace) -> int:
    _add_baseline(args)
    planned = planned_study(args)
    output = args.output or study_folder(planned).report
    if output.is_file():
        raise ConfigError(f"--output {output}: is a file: name a folder")
    report = read_study(planned, args.baseline)
    written = write_study_report(report, output, None if args.no_run_reports else _run_report)
    _show(written)
    if args.strict and (wrong := [*written.missing, *(note for note in written.notes if note.startswith("report."))]):
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
    print(f"{written.page} and {written.files - 1} files beside it")


ACTION = Action(
    "Makes the study's report: tables with what is told from noise, plots, ledgers, links.", EPILOG, _arguments, _report
)
