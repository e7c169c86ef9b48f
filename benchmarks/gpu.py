"""Everything that only a GPU can say of this program, in parts that fit into minutes of a borrowed one.

    python benchmarks/gpu.py                             # all parts, each at most --limit seconds
    python benchmarks/gpu.py --part b,c --limit 240      # kernels: right, and how quick
    python benchmarks/gpu.py --part d --only 8b          # jobs whose names have "8b" in them
    python benchmarks/gpu.py --dry-run                   # without a GPU: walks through all of it at tiny shapes

    a  ceilings of the device: bandwidth, bf16 and fp8 products      d  decoders trained: tokens/s, memory, MFU
    b  every kernel against float64, forward and backward            e  the demo's recipe on GPU and CPU: loss curves
    c  every kernel's time against eager, torch.compile and a limit  f  pytest -m gpu

Rows are printed as they come and written to <date>-gpu.json and .md in --output after each one, where the rows of
earlier runs of the day stay, so that a part may be killed and another begun. Exit codes: 0 · 1 a kernel is wrong, a
test fails or a row could not be made · 2 usage · 6 a package is missing, or there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gpu_setting import EXIT_UNAVAILABLE, ROOT, missing_packages, run_words, set_up, use_wheels, words_of_missing

if TYPE_CHECKING:
    from gpu_job import Context, Job

PARTS = {
    "a": "gpu_ceilings",
    "b": "gpu_correctness",
    "c": "gpu_speed",
    "d": "gpu_training",
    "e": "gpu_curves",
    "f": "gpu_device_tests",
}
RESULTS = ROOT / "benchmarks" / "results"
EXIT_USAGE = 2


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="a,b,c,d,e,f", help="letters with commas; default all, in this order")
    parser.add_argument("--only", metavar="TEXT", action="append", help="only jobs with TEXT in their name; may repeat")
    parser.add_argument("--limit", default="500", help="seconds after which a part begins no job: 240, or a=30,d=400")
    parser.add_argument("--total", type=float, default=1e9, help="the same for all parts together")
    parser.add_argument(
        "--profile", metavar="CASE", default="", help='profile this case of part d, say "llama-8b, T 8192"'
    )
    parser.add_argument("--choose-again", action="store_true", help="measure the choice of kernels anew")
    parser.add_argument("--seed", type=int, help="of all random numbers; default another one each time")
    parser.add_argument("--wheels", metavar="DIR", type=Path, help="wheels of missing packages, installed offline")
    parser.add_argument("--output", metavar="DIR", type=Path, help="default benchmarks/results")
    parser.add_argument("--dry-run", action="store_true", help="no GPU: tiny shapes, kernels interpreted, no figures")
    parser.add_argument("--resume", nargs=4, metavar=("PART", "JOB", "SECONDS", "FAILURES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.part = [part.strip() for part in arguments.part.split(",")]
    if unknown := [part for part in arguments.part if part not in PARTS]:
        parser.error(f"--part {unknown[0]!r} is unknown: there are {', '.join(PARTS)}")
    try:
        arguments.limit = limits_of(arguments.limit)
    except ValueError:
        parser.error(f"--limit {arguments.limit!r}: seconds for every part, or a=30,b=200 for some of them")
    if arguments.dry_run and arguments.output and arguments.output.resolve() == RESULTS:
        parser.error("--dry-run writes nothing into benchmarks/results: its figures mean nothing")
    return arguments


def limits_of(words: str) -> dict[str, float]:
    """Seconds by part: of "240" for each, of "a=30,d=400" for those and 500 for the others. ValueError for others."""
    if "=" not in words:
        return dict.fromkeys(PARTS, float(words))
    limits = dict.fromkeys(PARTS, 500.0)
    for word in words.split(","):
        part, seconds = word.split("=")
        if part.strip() not in PARTS:
            raise ValueError(part)
        limits[part.strip()] = float(seconds)
    return limits


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts; gives the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = arguments_of(argv)
    if arguments.wheels:
        use_wheels(arguments.wheels)
    if missing := missing_packages(arguments.part):
        print(f"error: {words_of_missing(missing)}", file=sys.stderr)
        return EXIT_UNAVAILABLE
    set_up(arguments.dry_run)
    import torch

    if not arguments.dry_run and not torch.cuda.is_available():
        print("error: torch sees no GPU: --dry-run walks through the script without one", file=sys.stderr)
        return EXIT_UNAVAILABLE
    with tempfile.TemporaryDirectory(prefix="gpu-benchmark-") as work:
        return _run(arguments, argv, Path(work))


def _run(arguments: argparse.Namespace, argv: list[str], work: Path) -> int:
    import torch
    from gpu_job import Clock, Context
    from gpu_results import DRY, Results, line_of

    device = torch.device("cpu" if arguments.dry_run else "cuda:0")
    words = run_words(argv, arguments.dry_run)
    output = arguments.output or (work / "results" if arguments.dry_run else RESULTS)
    results = Results(output, words, arguments.dry_run)
    seed = secrets.randbits(32) if arguments.seed is None else arguments.seed
    whole = Clock(arguments.total)
    context = Context(device, arguments.dry_run, seed, work, results, whole, whole, arguments)
    if unknown := _unknown_texts(context):
        print(f"error: {unknown}", file=sys.stderr)
        return EXIT_USAGE
    print(f"{DRY}\n" * arguments.dry_run + f"{line_of(dict(words))}, seed {seed}", flush=True)
    resume, failed = Resume.of(arguments.resume), list[str]()
    for part in PARTS:
        if part in arguments.part and part >= resume.part:
            spent = resume.seconds if part == resume.part else 0.0
            context.clock = Clock(min(arguments.limit[part], whole.left) - spent)
            failed += _part(context, part, PARTS[part], argv, resume, len(failed))
    count = resume.failures + len(failed)
    print("\n".join(["", *(f"FAILED {line}" for line in failed)]))
    print(f"{whole.spent:.0f} seconds, {count} failures; everything is in {results.path.with_suffix('.md')}")
    if arguments.dry_run:
        print(DRY)
    return int(count > 0)


@dataclass(frozen=True)
class Resume:
    """Where a process goes on that took over from one that lost the GPU: behind a job of a part, after so many seconds
    of it and failures before."""

    part: str = ""
    job: str = ""
    seconds: float = 0.0
    failures: int = 0

    @classmethod
    def of(cls, words: Sequence[str] | None) -> Resume:
        """As `words` gave it; the beginning where there are none."""
        return cls(words[0], words[1], float(words[2]), int(words[3])) if words else cls()

    def left(self, part: str, jobs: Sequence[Job]) -> Sequence[Job]:
        """Those behind the job."""
        names = [job.name for job in jobs]
        return jobs[names.index(self.job) + 1 :] if part == self.part and self.job in names else jobs


def _part(context: Context, part: str, name: str, argv: list[str], resume: Resume, failed_before: int) -> list[str]:
    """Runs a part's jobs while there is time; the lines of rows that failed."""
    from gpu_job import Job
    from gpu_results import line_of

    try:
        module: Any = importlib.import_module(name)
        jobs = resume.left(part, list(module.jobs(context)))
    except Exception as error:  # the other parts do not wait for this one's module
        module, broken = None, error
        jobs = [Job("import", lambda: _raise(broken))]
    title, notes, unsaid = (getattr(module, key, "") for key in ("TITLE", "NOTES", "UNSAID"))
    print(f"\n== {part}: {title} (at most {context.clock.limit:.0f} s)", flush=True)
    context.results.begin(part, title, notes)
    failed: list[str] = []
    late: list[str] = []
    for job in (job for job in jobs if _wanted(context.arguments, job.name)):
        if context.clock.left <= 0:
            late.append(job.name)
            continue
        rows, seconds = _rows_of(job)
        context.results.add(part, job.name, rows)
        for row in rows:
            line = line_of({key: value for key, value in row.items() if key not in unsaid})
            failed += [f"{part}: {line}"] * ("failed" in row)
            print(f"{'FAILED ' * ('failed' in row)}[{seconds:.1f} s] {line}", flush=True)
        if any("failed" in row for row in rows) and context.cuda and _device_is_lost():
            count = resume.failures + failed_before + len(failed)
            _begin_anew(context, [part, job.name, str(context.clock.spent), str(count)], argv)
    if late:
        context.results.leave_out(part, late, "no time")
        print(f"left out, no time: {'; '.join(late)}", flush=True)
    context.results.end(part, context.clock.spent)
    return failed


def _raise(error: Exception) -> NoReturn:
    raise error


def _unknown_texts(context: Context) -> str:
    """What is wrong with --only: texts that no job of the parts has in its name. Empty where each has one."""
    if not (texts := context.arguments.only):
        return ""
    names: dict[str, list[str]] = {}
    for part in context.arguments.part:
        try:
            with redirect_stdout(StringIO()):  # what a part says when it runs
                names[part] = [job.name for job in importlib.import_module(PARTS[part]).jobs(context)]
        except Exception:
            return ""  # a part that is broken is reported as such when it is run
    absent = [text for text in texts if not any(text in name for found in names.values() for name in found)]
    if not absent:
        return ""
    there = "\n".join(f"  {part}: {'; '.join(dict.fromkeys(found))}" for part, found in names.items())
    return f"--only {absent[0]!r}: no job has that in its name. There are:\n{there}"


def _wanted(arguments: argparse.Namespace, name: str) -> bool:
    return not arguments.only or any(text in name for text in arguments.only)


def _rows_of(job: Job) -> tuple[Sequence[dict[str, Any]], float]:
    """A job's rows; one that says why, where it could not be done: the others go on."""
    from gpu_job import first_line

    begin = time.perf_counter()
    try:
        rows = job.run()
    except Exception as error:
        import traceback

        traceback.print_exc()
        rows = [{"failed": first_line(error)}]
    return rows, time.perf_counter() - begin


def _device_is_lost() -> bool:
    """Whether a fault such as an access outside of memory has ended this process's use of the GPU."""
    import torch

    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except Exception:
        return True
    return False


def _begin_anew(context: Context, resume: list[str], argv: list[str]) -> None:
    """This process becomes a new one, which goes on behind the job that lost the device, in the time that is left."""
    print("the GPU is lost to this process: beginning anew behind this job", flush=True)
    argv = argv[: argv.index("--resume")] if "--resume" in argv else argv
    more = ["--resume", *resume, "--total", str(context.whole.left)]
    os.execv(sys.executable, [sys.executable, __file__, *argv, *more])


if __name__ == "__main__":
    raise SystemExit(main())
