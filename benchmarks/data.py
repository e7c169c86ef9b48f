"""The data path against Megatron-LM's own, both sides in one run: preprocessing, indexes, blend, resuming, reading.

    python benchmarks/data.py --peer PATH_TO_MEGATRON_LM --peer-python PYTHON --output benchmarks/results/data.md
    python benchmarks/data.py --peer PATH --only preprocess,blend --repeat 5
    python benchmarks/data.py --quick                  # tiny, ours alone: equality of outputs, seconds mean nothing

Every measurement is a process of its own, the two sides in turns, medians (lowest–highest). Times are wall clock; peak
memory is that of the largest process. benchmarks/README.md says how to make the peer's environment, and what each row
does. Exit code 1 where a check fails or a row does not finish.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import data_preprocessing
import data_sampling
from data_measure import MeasurementFailed, Row, commit_of, machine, measure
from data_setup import QUICK, Setup, Sizes

ROWS: dict[str, Callable[[Setup], Row]] = {
    "preprocess": data_preprocessing.byte_level,
    "sentencepiece": data_preprocessing.sentencepiece,
    "index": data_sampling.index,
    "second-arm": data_sampling.second_arm,
    "blend": data_sampling.blend,
    "resume": data_sampling.resume,
    "read": data_sampling.read,
}
DEVIATIONS = (
    "Megatron-LM runs unchanged, without TransformerEngine and apex, which its data path does not use; under Python "
    "3.11 `typing.override` comes from typing_extensions (it asks for 3.12); its C++ helpers are of its own Makefile",
    "both sides read and write the same file system; nothing is dropped from the page cache, and what was written is "
    "synced before the next measurement begins; ours syncs its output within the measured time, Megatron-LM does not",
)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, metavar="PATH", help="Megatron-LM's source tree, its helpers built")
    parser.add_argument(
        "--peer-python", default=sys.executable, metavar="PYTHON", help="interpreter for it (default: this one)"
    )
    parser.add_argument("--only", default=",".join(ROWS), metavar="ROW,…", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="measurements of each side (default 3)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report there, as it grows")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; only the checks mean something")
    parser.add_argument(
        "--work",
        type=Path,
        metavar="FOLDER",
        help="for corpora, datasets and outputs, kept for the next run (default: stagemix-benchmark in the temporary "
        "folder; --quick: a new one, deleted)",
    )
    arguments = parser.parse_args()
    if arguments.peer is None and not arguments.quick:
        parser.error("--peer PATH is needed, or --quick for ours alone")
    if arguments.peer is not None and not (arguments.peer / "megatron" / "core" / "datasets").is_dir():
        parser.error(f"--peer {arguments.peer}: no megatron/core/datasets in it")
    unknown = sorted(set(arguments.only.split(",")) - set(ROWS))
    if unknown or arguments.repeat < 1:
        parser.error(f"--only {','.join(unknown)}: no such row" if unknown else "--repeat: at least 1")
    return arguments


def header(arguments: argparse.Namespace) -> str:
    """What was run, where, and against what."""
    lines = ["# The data path, ours and Megatron-LM's in one run" if arguments.peer else "# The data path, ours alone"]
    lines += ["", "```", shlex.join(["python", *sys.argv]), "```", ""]
    lines += [f"- {line}" for line in machine()]
    lines.append(f"- {time.strftime('%Y-%m-%d')}, load average {os.getloadavg()[0]:.1f} at the start")
    lines.append(f"- Stagemix {commit_of(Path(__file__).resolve().parents[1])}")
    if arguments.peer:
        command = [
            arguments.peer_python,
            "-c",
            "import platform; print('RESULT \"' + platform.python_version() + '\"')",
        ]
        version = measure(command, 60).values
        lines.append(f"- Megatron-LM {commit_of(arguments.peer)}, Python {version}")
        lines += [f"- {line}" for line in DEVIATIONS]
    lines.append("- medians of several processes, taken in turns; in brackets the lowest and highest; MB = 1e6 bytes")
    return "\n".join(lines) + "\n"


def run(arguments: argparse.Namespace, work: Path) -> int:
    """Every row asked for; the report is printed, and written anew after each row."""
    sizes = QUICK if arguments.quick else Sizes()
    peer = arguments.peer.resolve() if arguments.peer else None
    setup = Setup(peer, arguments.peer_python, work.resolve(), arguments.repeat, sizes, arguments.quick)
    report, failed = header(arguments), 0
    print(report, flush=True)
    for name in arguments.only.split(","):
        began = time.perf_counter()
        try:
            row = ROWS[name](setup)
        except (MeasurementFailed, SystemExit) as error:
            row = dataclasses.replace(Row(name, "did not finish"), failed=str(error))
        row.remarks.append(f"this row took {time.perf_counter() - began:.0f} s")
        failed += bool(row.failed)
        print(row.markdown(), flush=True)
        report += "\n" + row.markdown()
        if arguments.output:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(report)
    return 1 if failed else 0


def main() -> int:
    """Runs the benchmark."""
    arguments = parse()
    if arguments.work is None and arguments.quick:
        with tempfile.TemporaryDirectory(prefix="stagemix-benchmark-") as folder:
            return run(arguments, Path(folder))
    work = arguments.work or Path(tempfile.gettempdir(), "stagemix-benchmark")
    work.mkdir(parents=True, exist_ok=True)
    return run(arguments, work)


if __name__ == "__main__":
    raise SystemExit(main())
