"""`make study-toy`: a whole study on files that this machine already has, as the very commands that a user would type.

It gathers corpora as `make demo` does, trains a tokenizer, preprocesses, plans, runs paper B's arms at toy size
(examples/studies/paper-b/toy.toml; with --study tuning paper A's) and ends in the report. Run again, it goes on where
it stopped, and no node is trained twice; with more seeds or arms it trains what is new. Everything is written below one
folder in the working directory.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))

from run import Step, claim, run_steps, shown, stagemix

HERE = Path(__file__).resolve().parent
MARK = "STAGEMIX-STUDY-TOY.txt"
ANEW = "make study-toy STUDY_ARGS=--fresh"
BESIDE = (
    ("suite", "puzzles.toml"),
    ("data", "puzzles"),
    ("suite", "../paper-b/puzzles.toml"),
    ("data", "../paper-b/puzzles"),
    ("prompts", "instructions.jsonl"),
)
"""Keys of study files with paths that are relative to the file's place in examples/."""


@dataclass(frozen=True)
class Study:
    """output: folder of the study, below the scale's · arms: that are run where none are named; none: all ·
    variants, instructions: corpora that gather_variants.py and gather_instructions.py make for it · sweep: (arms,
    baseline) of a report of their own, since they are shorter than the others."""

    path: Path
    output: str
    arms: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    instructions: tuple[str, ...] = ()
    sweep: tuple[str, str] | None = None


STUDIES = {
    "stages": Study(
        HERE / "paper-b" / "toy.toml",
        "study",
        # cooldowns without code need tokens of their own: --all-arms
        ("text", "balanced", "balanced-to-text", "code-to-text", "*-cooldown-code", "share-*"),
        sweep=("share-*", "share-0"),
    ),
    "quality": Study(HERE / "paper-b" / "toy-quality.toml", "quality", variants=("headers", "documented")),
    "tuning": Study(
        HERE / "paper-a" / "toy.toml",
        "tuning",
        instructions=("text_instructions", "code_instructions"),
        sweep=("[a-z]*", "uniform"),  # the three orders; the arms of stages are called NN to CC
    ),
}


@dataclass(frozen=True)
class Scale:
    """How large. changes: words of the study's file, and what stands in their place, in this order."""

    folder: Path
    vocab_size: int
    gather: tuple[str, ...]
    variants: tuple[str, ...] = ()
    instructions: tuple[str, ...] = ()
    changes: tuple[tuple[str, str], ...] = ()


SCALES = {
    "full": Scale(Path("study-toy"), 4096, ("--code-bytes", "12M", "--text-bytes", "16M")),
    "tiny": Scale(
        Path("study-toy-tiny"),
        512,
        ("--code-bytes", "1M", "--text-bytes", "600K"),
        ("--bytes", "300K"),
        ("--records", "800"),
        (
            ("study-toy/", "study-toy-tiny/"),
            ("hidden_size = 192", "hidden_size = 32"),
            ("num_hidden_layers = 4", "num_hidden_layers = 1"),
            ("num_attention_heads = 3", "num_attention_heads = 2"),
            ("num_key_value_heads = 3", "num_key_value_heads = 2"),
            ("intermediate_size = 512", "intermediate_size = 64"),
            ("seq_length = 256", "seq_length = 640"),
            ("seq_length = 512", "seq_length = 256"),
            ("fraction = 0.05", "fraction = 0.2"),
            ("2_048_000", "20_480"),
            ("4_096_000", "40_960"),
            ("409_600", "4_096"),
            ("global_batch_size = 16", "global_batch_size = 8"),
            ("50 steps", "2 steps"),
            ("40 steps", "2 steps"),
            ("samples = 32", "samples = 8"),
            ("samples = 7_680", "samples = 320"),
            ("samples = 4_800", "samples = 200"),
            ("samples = 2_880", "samples = 120"),
            ('tokens = "60K"', 'tokens = "4K"'),
            ("questions = 200, passages = 20_000", "questions = 10, passages = 4_000"),
            ('data = "puzzles"', 'data = "puzzles", limit = 10'),
            ('data = "../paper-b/puzzles"', 'data = "../paper-b/puzzles", limit = 10'),
            ("max_new_tokens = 48", "max_new_tokens = 4"),
        ),
    ),
}


def study_of(study: Study, scale: Scale, precision: str) -> tuple[Path, str | None]:
    """(the study file, its content where it is not the one in examples/ as it stands)."""
    changes = scale.changes
    if precision != "bf16":
        changes = (*changes, ('precision = "bf16"', f'precision = "{precision}"'))
    if not changes:
        return study.path, None
    for key, name in BESIDE:
        words = f"{key} = {json.dumps(name)}"
        changes = (*changes, (words, f"{key} = {json.dumps(os.path.normpath(study.path.parent / name))}"))
    text = study.path.read_text(encoding="utf-8")
    for old, new in changes:
        text = text.replace(old, new)
    name = study.path.relative_to(HERE).as_posix()
    head = f"# examples/studies/{name} with other values, written by examples/studies/run_toy.py\n\n"
    return scale.folder / f"{study.output}.toml", head + text


def precision_here(cpu: Path = Path("/proc/cpuinfo")) -> str:
    """bf16 where the processor has instructions for it, as its kernel lists them; else fp32.

    What stands on the tin, and not what was quicker today: precision is part of what a node is.
    """
    try:
        lines = cpu.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return "fp32"
    words = {word for line in lines if line.lower().startswith(("flags", "features")) for word in line.split()}
    return "bf16" if words & {"avx512_bf16", "amx_bf16", "bf16"} else "fp32"


def steps_of(study: Study, scale: Scale, file: Path, arms: Sequence[str], seeds: Sequence[str]) -> list[Step]:
    """The toy, in order. file: the study's · arms, seeds: --arm and --seeds for `stagemix study`."""
    folder = scale.folder
    tokenizer = folder / "tokenizer.model"
    both, into = ("code", "text"), ("--output", str(folder / "corpora"))
    gather = [sys.executable, shown(HERE.parent / "demo" / "gather.py"), *into, *scale.gather]
    variants = [sys.executable, shown(HERE / "gather_variants.py"), *into, *scale.variants]
    instructions = [sys.executable, shown(HERE / "gather_instructions.py"), *into, *scale.instructions]

    def corpora(names: Sequence[str]) -> tuple[Path, ...]:
        return tuple(folder / "corpora" / f"{name}.jsonl" for name in names)

    def preprocess(names: Sequence[str], step: str, *words: str, parts: tuple[str, ...] = ()) -> Step:
        prefixes = [folder / "data" / name for name in names]
        commands = [
            stagemix(
                *("preprocess_data", "--input", str(path), "--output-prefix", str(prefix)),
                *("--tokenizer", str(tokenizer), *words),
            )
            for path, prefix in zip(corpora(names), prefixes, strict=True)
        ]
        outputs = tuple(prefix.with_suffix(end) for prefix in prefixes for end in (".bin", ".idx", ".json", *parts))
        return Step(step, "turn them into indexed tokens", lambda: commands, outputs)

    def of_study(action: str, title: str, *words: str) -> Step:
        commands = [stagemix("study", action, shown(file), *words, *arms, *seeds)]
        if action == "report":
            commands += [stagemix("study", action, shown(file), *more, *seeds) for more in _sweeps(study, folder, arms)]
        return Step(action, title, lambda: commands, (), clears=False, always=True)

    train_tokenizer = stagemix("train_tokenizer", "--input", *map(str, corpora(both)), "--output", str(tokenizer))
    train_tokenizer += ["--vocab-size", str(scale.vocab_size)]
    steps = [
        Step("gather", "code and prose of this machine", lambda: [gather], corpora(both), shlex.join(gather[1:])),
        Step("train_tokenizer", "on both", lambda: [train_tokenizer], (tokenizer,), str(scale.vocab_size)),
        preprocess(both, "preprocess_data"),
    ]
    if study.variants:
        made = corpora(study.variants)
        steps += [
            Step("gather_variants", "other kinds of code", lambda: [variants], made, shlex.join(variants[1:])),
            preprocess(study.variants, "preprocess_variants"),
        ]
    if study.instructions:
        made, chat = corpora(study.instructions), ("--format", "chat", "--chat-template", "alpaca")
        title = "what documented Python asks and answers"
        steps += [
            Step("gather_instructions", title, lambda: [instructions], made, shlex.join(instructions[1:])),
            preprocess(study.instructions, "preprocess_instructions", *chat, parts=(".mask",)),
        ]
    return [
        *steps,
        of_study("plan", "what will be trained, and what arms share"),
        # one thread each: sums on a CPU depend on their number, and two processes do more than two threads
        of_study("run", "train each node once, and evaluate the ends of arms", "--threads", "1"),
        # in the place of the whole study's report: the toy's arms are chosen, and are all that there is of it
        of_study("report", "tables, plots, and how sure they are", "--output", str(folder / study.output / "report")),
    ]


def _sweeps(study: Study, folder: Path, arms: Sequence[str]) -> list[tuple[str, ...]]:
    """Words of the report of the study's sweep, where it is run."""
    if study.sweep is None or (arms and study.sweep[0] not in arms):
        return []
    pattern, baseline = study.sweep
    output = folder / study.output / f"report-{baseline.partition('-')[0]}"
    return [("--arm", pattern, "--baseline", baseline, "--output", str(output))]


def arms_of(args: argparse.Namespace) -> list[str]:
    """--arm for `stagemix study`; nothing for all."""
    arms = args.arm or (() if args.all_arms else STUDIES[args.study].arms)
    return [word for arm in arms for word in ("--arm", arm)]


def command_line() -> argparse.ArgumentParser:
    """The program's arguments."""
    parser = argparse.ArgumentParser(
        prog="python examples/studies/run_toy.py",
        description='"To Code, or Not To Code?" and "At Which Training Stage Does Code Data Help LLMs Reasoning?" at '
        "toy size, on files that this machine already has, from corpora to report. Run again, it goes on where it was.",
        epilog='example: make study-toy STUDY_ARGS="--seeds 1,2,3"',
    )
    parser.add_argument(
        "--study",
        choices=STUDIES,
        default="stages",
        help="stages: when and how much code; quality: which code; tuning: code in tuning, and in which order",
    )
    parser.add_argument("--seeds", metavar="1,2,3", help="every arm once for each; default as the study's file says")
    arms = parser.add_mutually_exclusive_group()
    arms.add_argument("--arm", action="append", metavar="NAME", help="an arm or a pattern, instead of the usual ones")
    arms.add_argument("--all-arms", action="store_true", help="also cooldowns without code")
    parser.add_argument("--scale", choices=SCALES, default="full", help="tiny: every part, learns nothing")
    parser.add_argument("--fresh", action="store_true", help="delete what an earlier run left and begin anew")
    parser.add_argument(
        "--precision", choices=("bf16", "fp32"), help="default: bf16 where the processor has instructions for it"
    )
    return parser


def main() -> int:
    args = command_line().parse_args()
    study, scale = STUDIES[args.study], SCALES[args.scale]
    if obstacle := claim(scale.folder, args.fresh, MARK, "examples/studies/run_toy.py"):
        print(f"error: {obstacle}", file=sys.stderr)
        return 2
    precision = args.precision or precision_here()
    if precision == "fp32" and not args.precision:
        print("this processor lists no instructions for bf16: every node is trained in fp32, which is another node")
    file, content = study_of(study, scale, precision)
    if content is not None:
        file.write_text(content, encoding="utf-8")
    steps = steps_of(study, scale, file, arms_of(args), ["--seeds", args.seeds] if args.seeds else [])
    code, seconds = run_steps(steps, scale.folder, ANEW)
    if code == 0:
        width = max(map(len, seconds))
        print(f"\n{'step':<{width}}  seconds")
        for name, value in [*seconds.items(), ("total", sum(seconds.values()))]:
            print(f"{name:<{width}}  {value:7.1f}")
        print(f"\nOpen {scale.folder / study.output / 'report' / 'index.html'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
