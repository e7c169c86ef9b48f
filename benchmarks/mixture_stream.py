"""Times the mixture over sources: samples in order, the first one, seeks, resumes, memory. Asserts nothing.

python benchmarks/mixture_stream.py [--samples 1000000] [--repeats 5]

Times are processor time of the one thread that works, so that other work on the machine weighs little; of several runs
the median and the least are given.
"""

from __future__ import annotations

import argparse
import random
import time
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from statistics import median
from typing import NamedTuple

from megatron.data.mixture import MixtureStream, open_mixture
from megatron.data.native import backend_name
from megatron.data.weight_function import Segment, WeightFunction
from megatron.data.weights import round_shares

SOURCES = (2, 8, 64)
HORIZON = 10**12


class Figure(NamedTuple):
    """One row of the table."""

    name: str
    middle: float
    least: float
    unit: str


def constant(sources: int, seed: int = 0) -> WeightFunction:
    """One weight for each source, over a denominator of 1e6."""
    draw = random.Random(seed)
    return WeightFunction.constant(_shares(sources, draw))


def ramp(sources: int, length: int = HORIZON, seed: int = 0) -> WeightFunction:
    """Weights that go linearly from some to others over `length` samples."""
    draw = random.Random(seed)
    return WeightFunction.make([Segment(0, _shares(sources, draw), length, _shares(sources, draw))])


def fading_ramp(sources: int, length: int = HORIZON) -> WeightFunction:
    """Half the sources fade out while the other half fades in: the hardest seeks are near its ends."""
    names = [f"source-{number:03d}" for number in range(sources)]
    ends = [dict.fromkeys(half, 1) for half in (names[: sources // 2], names[sources // 2 :])]
    return WeightFunction.make([Segment(0, ends[0], length, ends[1])])


def phases(sources: int, count: int = 50, length: int = 20_011, seed: int = 0) -> WeightFunction:
    """Other weights every `length` samples."""
    draw = random.Random(seed)
    return WeightFunction.make([Segment(number * length, _shares(sources, draw)) for number in range(count)])


def _shares(sources: int, draw: random.Random) -> dict[str, int]:
    return round_shares({f"source-{number:03d}": Fraction(draw.randint(1, 1000)) for number in range(sources)})


def grouped(function: WeightFunction, groups: int) -> dict[str, str]:
    """The sources dealt out to so many groups."""
    return {name: f"group-{number % groups:03d}" for number, name in enumerate(function.sources)}


def measured(
    repeats: int, prepare: Callable[[], MixtureStream], work: Callable[[MixtureStream], object]
) -> list[float]:
    """Seconds of processor time of `work`, several times, each on a stream of its own."""
    seconds = []
    for _ in range(repeats):
        stream = prepare()
        start = time.thread_time()
        work(stream)
        seconds.append(time.thread_time() - start)
    return seconds


def running(samples: int, repeats: int) -> list[Figure]:
    """Nanoseconds a sample in order, by kind of weights, number of sources and of groups."""
    figures = []
    for kind, make in (("constant", constant), ("phases", phases), ("ramp", ramp)):
        for sources in SOURCES:
            function = make(sources)
            for groups in sorted({2, sources}):
                names = grouped(function, groups)
                seconds = measured(
                    repeats,
                    lambda function=function, names=names: open_mixture(function, names),  # type: ignore[misc]
                    lambda stream: stream.take(samples),
                )
                label = f"{kind}, {sources} sources in {groups} groups"
                figures.append(_figure(label, [1e9 * value / samples for value in seconds], "ns a sample"))
    return figures


def first_sample(repeats: int) -> list[Figure]:
    """Milliseconds from the weights to the first sample."""
    figures = []
    for sources in SOURCES:
        function = constant(sources)
        names = grouped(function, 2)
        values = []
        for _ in range(repeats):
            start = time.thread_time()
            open_mixture(function, names).take(1)
            values.append(1e3 * (time.thread_time() - start))
        figures.append(_figure(f"first sample, {sources} sources", values, "ms"))
    return figures


def seeking(repeats: int) -> list[Figure]:
    """Milliseconds of a seek from the start to a random sample of 1e12, and near the ends of a ramp to zero."""
    draw = random.Random(1)
    anywhere = [draw.randrange(HORIZON // 1000, HORIZON) for _ in range(4 * repeats)]
    near_end = [HORIZON - draw.randrange(1, 10**6) for _ in range(repeats)]
    near_start = [draw.randrange(1, 10**7) for _ in range(repeats)]
    figures = []
    for sources in SOURCES:
        cases = [
            ("constant", constant(sources), anywhere),
            ("50 phases", phases(sources, 50, HORIZON // 50), anywhere),
            ("ramp", ramp(sources), anywhere),
            ("last 1e6 samples of a fading ramp", fading_ramp(sources), near_end),
            ("first 1e7 samples of a fading ramp", fading_ramp(sources), near_start),
        ]
        for kind, function, places in cases:
            stream = open_mixture(function, grouped(function, sources), horizon=HORIZON)
            values = []
            for place in places:
                stream.seek(0)
                start = time.thread_time()
                stream.seek(place)
                values.append(1e3 * (time.thread_time() - start))
            figures.append(_figure(f"seek, {sources} sources, {kind}", values, "ms"))
            figures.append(Figure(f"seek, {sources} sources, {kind}: longest", max(values), max(values), "ms"))
    return figures


def resuming(repeats: int) -> list[Figure]:
    """Milliseconds from the counts at sample 1e9 to the next sample."""
    figures = []
    for sources in SOURCES:
        function = ramp(sources)
        names = grouped(function, sources)
        stream = open_mixture(function, names, horizon=HORIZON)
        stream.seek(10**9)
        counts = list(stream.counts)
        values = []
        for _ in range(repeats):
            start = time.thread_time()
            open_mixture(function, names, counts, horizon=HORIZON).take(1)
            values.append(1e3 * (time.thread_time() - start))
        figures.append(_figure(f"resume at 1e9 in a ramp, {sources} sources", values, "ms"))
    return figures


def memory() -> list[Figure]:
    """KiB that Python sees of a stream after a million samples were taken a thousand at a time, and the process's
    growth by the same."""
    figures = []
    for sources in SOURCES:
        function = constant(sources)
        names = grouped(function, sources)
        stream = open_mixture(function, names)
        stream.take(1000)
        before = _resident_kib()
        tracemalloc.start()
        for _ in range(1000):
            stream.take(1000)
        peak = tracemalloc.get_traced_memory()[1] / 1024
        tracemalloc.stop()
        figures.append(Figure(f"Python memory of a million samples, {sources} sources", peak, peak, "KiB at most"))
        grown = _resident_kib() - before
        figures.append(Figure(f"process growth over a million samples, {sources} sources", grown, grown, "KiB"))
    return figures


def _resident_kib() -> float:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * 4.0
    except OSError:
        return 0.0


def _figure(name: str, values: list[float], unit: str) -> Figure:
    return Figure(name, median(values), min(values), unit)


def figures(samples: int = 1_000_000, repeats: int = 5) -> list[Figure]:
    """Every row of the table."""
    rows = running(samples, repeats) + first_sample(repeats) + seeking(repeats) + resuming(repeats)
    return rows + memory()


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{backend_name()}; median and least of {arguments.repeats} runs")
    for row in figures(arguments.samples, arguments.repeats):
        print(f"  {row.name:<64} {row.middle:10.3f} {row.least:10.3f}  {row.unit}", flush=True)


if __name__ == "__main__":
    main()
