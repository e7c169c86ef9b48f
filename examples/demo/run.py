"""`make demo`: the whole path, as the very commands that a user would type, on files that this machine already has.

Each step is a command of its own with its own progress; finished steps are skipped when the demo is run again, and
training goes on from its newest checkpoint. Everything is written below one folder in the working directory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

HERE = Path(__file__).resolve().parent
MARK = "STAGEMIX-DEMO.txt"


@dataclass(frozen=True)
class Scale:
    """How large: the config (whose paths name `folder`), the vocabulary, and more words for the gathering."""

    folder: Path
    config: Path
    vocab_size: int
    gather: tuple[str, ...] = ()
    evaluate: tuple[str, ...] = ()


SCALES = {
    "full": Scale(Path("demo"), HERE / "demo.toml", 8192),
    "tiny": Scale(
        Path("demo-tiny"),
        HERE / "tiny.toml",
        1024,
        ("--code-bytes", "2M", "--text-bytes", "1M"),
        ("--questions", "40", "--passages", "8000"),
    ),
}


@dataclass(frozen=True)
class Step:
    """One line of the summary. `commands` is called when the step's turn comes; `outputs` are what it leaves.

    inputs: whatever decides its outcome besides the steps before it; when that changes, it runs again.
    clears: whether old outputs are removed first; training keeps its own, to resume from.
    always: whether it runs each time, since it passes over by itself what is done.
    """

    name: str
    title: str
    commands: Callable[[], list[list[str]]]
    outputs: tuple[Path, ...]
    inputs: str = ""
    clears: bool = True
    always: bool = False


def steps_of(scale: Scale) -> list[Step]:
    """The demo, in order."""
    folder, config = scale.folder, shown(scale.config)
    text = scale.config.read_text(encoding="utf-8")
    corpora = {source: folder / "corpora" / f"{source}.jsonl" for source in ("code", "text")}
    tokenizer = folder / "tokenizer.model"
    run, models, results = folder / "run", folder / "models", folder / "evaluation.json"
    report = folder / "report.html"

    gather = [sys.executable, shown(HERE / "gather.py"), "--output", str(folder / "corpora"), *scale.gather]
    train_tokenizer = stagemix("train_tokenizer", "--input", *map(str, corpora.values()), "--output", str(tokenizer))
    train_tokenizer += ["--vocab-size", str(scale.vocab_size)]

    def preprocess(source: str) -> list[str]:
        words = ("--input", str(corpora[source]), "--output-prefix", str(folder / "data" / source))
        return stagemix("preprocess_data", *words, "--tokenizer", str(tokenizer))

    def export() -> list[list[str]]:
        ends = stage_ends(run / "checkpoints")
        return [
            stagemix("export_hf", "--input", str(path), "--output", str(models / stage)) for stage, path in ends.items()
        ]

    def evaluate() -> list[list[str]]:
        named = [word for stage in stage_ends(run / "checkpoints") for word in ("--model", f"{stage}={models / stage}")]
        words = ("--suite", "heldout", "--config", config, *scale.evaluate, "--output", str(results))
        return [stagemix("evaluate", *named, *words)]

    draw = stagemix("report", "--run", str(run), "--evaluation", str(results), "--output", str(report))
    data = [preprocess(source) for source in corpora]
    return [
        Step(
            "gather",
            "gather code and prose from this machine",
            lambda: [gather],
            tuple(corpora.values()),
            shlex.join(gather[1:]),
        ),
        Step(
            "train_tokenizer",
            "train a tokenizer on both",
            lambda: [train_tokenizer],
            (tokenizer,),
            str(scale.vocab_size),
        ),
        Step("preprocess_data", "turn both into indexed tokens", lambda: data, (folder / "data",)),
        Step("plan", "what the config would train on", lambda: [stagemix("plan", config)], (), text),
        Step("train", "train through three stages", lambda: [stagemix("train", config)], (run,), text, clears=False),
        Step("export_hf", "export each stage's end, with proof", export, (models,)),
        Step("evaluate", "choose the true continuation", evaluate, (results,), shlex.join(scale.evaluate)),
        Step("report", "draw it all", lambda: [draw], (report,)),
    ]


def stagemix(command: str, *words: str) -> list[str]:
    """`stagemix COMMAND …`: the console script beside this interpreter, or the same from the source tree."""
    script = Path(sys.executable).parent / "stagemix"
    start = (
        [str(script), command] if script.exists() else [sys.executable, str(HERE.parents[1] / f"tools/{command}.py")]
    )
    return [*start, *words]


def shown(path: Path) -> str:
    """The path as a user would type it here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def as_typed(command: Sequence[str]) -> str:
    """The command line in the words of the README."""
    names = {str(Path(sys.executable).parent / "stagemix"): "stagemix", sys.executable: "python"}
    return shlex.join(names.get(word, word) for word in command)


def stage_ends(checkpoints: Path) -> dict[str, Path]:
    """The checkpoint at the end of each training stage, by the stage's name, in the order of training."""
    ends: dict[str, Path] = {}
    for manifest in sorted(checkpoints.glob("step-*/manifest.json")):
        if json.loads(manifest.read_text(encoding="utf-8"))["keep_forever"]:
            state = json.loads((manifest.parent / "state.json").read_text(encoding="utf-8"))
            ends[state["training_stage"]] = manifest.parent
    return ends


def run_steps(
    steps: Sequence[Step], folder: Path, anew: str = "make demo DEMO_ARGS=--fresh"
) -> tuple[int, dict[str, float]]:
    """Runs what is not finished yet: the exit code of the first step that fails, or 0, and each step's seconds.

    anew: the command that begins anew, for messages.
    """
    seconds: dict[str, float] = {}
    key = ""
    for number, step in enumerate(steps, 1):
        key = hashlib.sha256(json.dumps([key, step.name, step.inputs]).encode()).hexdigest()
        stamp = folder / "steps" / f"{step.name}.json"
        print(f"\n[{number}/{len(steps)}] {step.name}: {step.title}", flush=True)
        if (earlier := finished(stamp, key, step)) is not None:
            seconds[step.name] = earlier
            print(f"      finished before, in {earlier:.1f} s", flush=True)
            continue
        stamp.unlink(missing_ok=True)
        if step.clears:
            clear(step.outputs)
        start = time.monotonic()
        for command in step.commands():
            print(f"      $ {as_typed(command)}", flush=True)
            if code := run(command):
                explain(number, step, command, code, anew)
                return code, seconds
        seconds[step.name] = time.monotonic() - start
        stamp.parent.mkdir(exist_ok=True)
        stamp.write_text(json.dumps({"key": key, "seconds": seconds[step.name]}), encoding="utf-8")
        print(f"      done in {seconds[step.name]:.1f} s", flush=True)
    return 0, seconds


def finished(stamp: Path, key: str, step: Step) -> float | None:
    """The seconds that the step took when it finished with the same inputs, or None where it has to run."""
    if step.always:
        return None
    try:
        record = json.loads(stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = record.get("key") == key and all(path.exists() for path in step.outputs)
    return float(record["seconds"]) if whole else None


def clear(outputs: Sequence[Path]) -> None:
    """Removes what an unfinished or outdated run of a step left."""
    for path in outputs:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def run(command: Sequence[str]) -> int:
    """The command's exit code. A signal to stop goes to the command, which saves; this process waits for it."""
    # GNU OpenMP's threads wait for each other in a busy loop; where something else wants the cores too, a short one
    # makes steps up to three times faster, and on idle cores it costs nothing (docs/lab-notes.md).
    process = subprocess.Popen(list(command), env={"GOMP_SPINCOUNT": "10000", **os.environ})

    def forward(number: int, frame: FrameType | None) -> None:
        # Ctrl-C reaches the whole foreground group by itself
        if number != signal.SIGINT:
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def explain(number: int, step: Step, command: Sequence[str], code: int, anew: str) -> None:
    """Says what failed, or was stopped, and how to go on."""
    if code == 75:
        print(f"\nstopped in step {number} ({step.name}): type the same command again to go on", file=sys.stderr)
        return
    print(
        f"\nerror: step {number} ({step.name}) ended with exit code {code} (docs/exit-codes.md): {as_typed(command)}\n"
        "To go on: repair what the message above says and type the same command again; finished steps are skipped and "
        f"training resumes.\nTo begin anew: add --fresh ({anew}).",
        file=sys.stderr,
        flush=True,
    )


def summarise(scale: Scale, seconds: dict[str, float]) -> None:
    """Prints the seconds of each step, the headline numbers and where the report lies."""
    width = max(map(len, seconds))
    print(f"\n{'step':<{width}}  seconds")
    for name, value in [*seconds.items(), ("total", sum(seconds.values()))]:
        print(f"{name:<{width}}  {value:7.1f}")
    for line in [*losses(scale.folder / "run" / "metrics.jsonl"), *accuracies(scale.folder / "evaluation.json")]:
        print(line)
    print(f"\nOpen {scale.folder / 'report.html'}")


def losses(metrics: Path) -> list[str]:
    """First and last validation loss of each source."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    rows = [row["validation"] for row in rows if row.get("validation")]
    if not rows:
        return []
    return ["", *(f"validation loss, {name}: {rows[0][name]:.2f} -> {rows[-1][name]:.2f}" for name in rows[-1])]


def accuracies(results: Path) -> list[str]:
    """Accuracy of each model on each task with a right answer, and what chance would give."""
    record: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    chance = {name: task["chance"] for name, task in record["tasks"].items() if task["chance"]}
    lines = [""]
    for model in record["models"]:
        right = {name: model["results"][name]["metrics"]["acc_mutual_info"]["value"] for name in chance}
        words = (f"{name} {value:.1%} (chance {chance[name]:.0%})" for name, value in right.items())
        lines.append(f"right answers, {model['name']}: {', '.join(words)}")
    return lines


def claim(folder: Path, fresh: bool, mark: str = MARK, program: str = "examples/demo/run.py") -> str | None:
    """Makes the folder ours. What stands in the way, if a folder of that name is somebody else's.

    mark: name of the file that says whose it is.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / mark).exists():
        return f"the folder {folder} exists and was not made by this demo: move it, or run from another folder"
    if fresh and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    (folder / mark).write_text(f"Written by {program}; --fresh deletes this folder.\n", encoding="utf-8")
    return None


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python examples/demo/run.py",
        description="The whole path on files that this machine already has. Run again, it goes on where it stopped.",
        epilog="example: python examples/demo/run.py --scale tiny",
    )
    parser.add_argument(
        "--scale", choices=SCALES, default="full", help="tiny: every part, about a minute, learns little"
    )
    parser.add_argument("--fresh", action="store_true", help="delete what an earlier run left and begin anew")
    args = parser.parse_args()
    scale = SCALES[args.scale]
    if obstacle := claim(scale.folder, args.fresh):
        print(f"error: {obstacle}", file=sys.stderr)
        return 2
    code, seconds = run_steps(steps_of(scale), scale.folder)
    if code == 0:
        summarise(scale, seconds)
    return code


if __name__ == "__main__":
    sys.exit(main())
