"""`stagemix compare`: models of one or more results files against a baseline, item by item."""

from __future__ import annotations

import argparse
import difflib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.config.errors import EXIT_DONE, ConfigError
from megatron.evaluation.comparison import compare_results, comparison_table
from megatron.evaluation.paired import RESAMPLES
from megatron.evaluation.results import Merged, merge_records, write_record

EXAMPLE = """examples:
  stagemix compare evaluation.json --baseline text-only
      every other model of the file against text-only
  stagemix compare first.json second.json --baseline text-only --model code-first --output comparison.json
      models of several files, as long as they answered the same items
  stagemix compare first=one/evaluation.json second=other/evaluation.json
      files of one model each, whose models have the same name there

A paired bootstrap over items: 95 % intervals, two-sided p-values, and Holm's for the whole table. `better` names a
model where the interval does not hold 0.

exit codes: 0 done, 2 unknown model, 3 a file that is no result, or models that answered different items"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    built = argparse.ArgumentParser(
        prog="stagemix compare",
        description="Compares models item by item, from results files of stagemix evaluate.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    built.add_argument(
        "files", nargs="+", metavar="[NAME=]FILE.json", help="results of stagemix evaluate; NAME: of a file's one model"
    )
    built.add_argument("--baseline", metavar="NAME", help="the model to compare with; default: the first one")
    built.add_argument("--model", dest="models", action="append", metavar="NAME", help="only this one; repeatable")
    built.add_argument("--resamples", type=int, default=RESAMPLES, help="default: %(default)s")
    built.add_argument("--seed", type=int, default=0, help="of the resamples (default: %(default)s)")
    built.add_argument("--output", type=Path, metavar="FILE.json", help="write the tables as JSON too")
    return built


def main(argv: list[str] | None = None) -> int:
    """Runs the command and gives its exit code."""
    args = parser().parse_args(argv)
    if args.resamples < 100:
        raise ConfigError(f"--resamples {args.resamples}: at least 100, and thousands for a p-value")
    named = [_named_file(words) for words in args.files]
    merged = merge_records([path for _, path in named], {path: name for name, path in named if name})
    names = list(merged.results)
    for name in [args.baseline, *(args.models or [])]:
        if name is not None:
            _check_known(name, names)
    if len(names) < 2:
        raise ConfigError(
            f"{', '.join(args.files)}: {len(names)} model ({', '.join(names)}), and two are needed to compare: give "
            "another file too. Models of one name are one model: NAME=FILE.json calls a file's model otherwise"
        )
    baseline = args.baseline or names[0]
    others = args.models or [name for name in names if name != baseline]
    tables = [print_comparison(merged, baseline, other, args.resamples, args.seed) for other in others]
    if args.output is not None:
        write_record(args.output, {"format": 1, "resamples": args.resamples, "seed": args.seed, "comparisons": tables})
        print(f"written to {args.output}")
    return EXIT_DONE


def print_comparison(merged: Merged, baseline: str, other: str, resamples: int, seed: int) -> dict[str, Any]:
    """Prints the table of `other` minus `baseline` and gives it as data. Raises DataError for unlike items."""
    if baseline == other:
        raise ConfigError(f"model {baseline} is compared with itself: name another")
    rows, notes = compare_results(
        baseline, merged.results[baseline], other, merged.results[other], merged.groups, resamples, seed
    )
    if not rows:
        raise ConfigError(f"models {baseline} and {other} have no task in common whose items were kept")
    notes = [*notes, *_dtype_notes(merged, (baseline, other))]
    print(f"\n{other} minus {baseline}, paired by item, {resamples:,} resamples")
    print("\n".join([*comparison_table(baseline, other, rows), *notes]))
    return {"baseline": baseline, "model": other, "rows": [asdict(row) for row in rows], "notes": notes}


def _dtype_notes(merged: Merged, names: tuple[str, str]) -> list[str]:
    """A warning where models were not computed alike: rounding alone then makes some of the difference."""
    found = {name: merged.dtypes.get(name, []) for name in names}
    if len({dtype for dtypes in found.values() for dtype in dtypes}) < 2:
        return []
    words = ", ".join(f"{name} in {' and '.join(dtypes) or 'a dtype not recorded'}" for name, dtypes in found.items())
    return [f"warning: computed in unlike dtypes, {words}: evaluate both with the same --dtype"]


def _named_file(words: str) -> tuple[str, Path]:
    """(name, path) of [NAME=]FILE.json; "" without a name. A file whose path has a "=" is itself."""
    name, equals, path = words.partition("=")
    if not equals or Path(words).exists() or "/" in name:
        return "", Path(words)
    return name, Path(path)


def _check_known(name: str, names: list[str]) -> None:
    if name in names:
        return
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(f"model {name!r} is in none of the files: {hint}they have {', '.join(names) or 'no models'}")
