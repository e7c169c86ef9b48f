"""`stagemix win_rate`: two models answer the same prompts, and a judge says which answer is better, in both orders."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.commands.evaluated_model import model_folder, named_model
from megatron.config.errors import EXIT_DONE, ConfigError, DataError
from megatron.evaluation.harness import HarnessSettings, Sampling, load_model
from megatron.evaluation.paired import FEW_ITEMS
from megatron.evaluation.precision import choose_dtype
from megatron.evaluation.results import write_record
from megatron.evaluation.win_rate import Duel, Judge, WinRate, command_judge, model_judge, win_rate

EXAMPLE = """examples:
  stagemix win_rate --model code=exports/code --model text=exports/text --prompts prompts.jsonl \\
                    --judge "python my_judge.py" --output win-rate.json
      my_judge.py reads lines {"prompt", "a", "b"} and writes as many lines {"winner": "a" | "b" | "tie"}
  stagemix win_rate --answers code=code.jsonl --answers text=text.jsonl --judge-model exports/large --output w.json
      answers that are there already; judged by bits a byte under a larger model, without any service

prompts: JSON lines {"prompt"}; answers: JSON lines {"prompt", "answer"}, of the same prompts in the same order

exit codes: 0 done, 2 wrong options, 3 files or verdicts that are wrong, 6 the judge cannot be run"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    built = argparse.ArgumentParser(
        prog="stagemix win_rate",
        description="Pairwise win rate of two models under a judge, each pair in both orders.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    built.add_argument(
        "--model", dest="models", action="append", default=[], metavar="[NAME=]PATH", help="a model that answers"
    )
    built.add_argument("--answers", action="append", default=[], metavar="NAME=FILE", help="a model's answers")
    built.add_argument("--prompts", type=Path, metavar="FILE.jsonl", help="what models are asked")
    built.add_argument("--judge", metavar="COMMAND", help="a command line, run without a shell")
    built.add_argument("--judge-model", type=Path, metavar="FOLDER", help="judge by bits a byte under this model")
    built.add_argument("--judge-seconds", type=float, default=3600, help="for the whole judging (default: %(default)s)")
    built.add_argument("--max-new-tokens", type=int, default=128, help="of an answer (default: %(default)s)")
    built.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token (default: %(default)s)")
    built.add_argument("--top-p", type=float, default=0.95, help="nucleus sampling (default: %(default)s)")
    built.add_argument("--batch-size", type=int, default=32, help="sequences at a time (default: %(default)s)")
    built.add_argument("--device", default="cpu", help='"cpu", "cuda" (default: %(default)s)')
    built.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of the computation")
    built.add_argument("--seed", type=int, default=0, help="of samples and of shuffling (default: %(default)s)")
    built.add_argument("--cache", type=Path, metavar="DIR", help="keep exported checkpoints here")
    built.add_argument("--output", type=Path, required=True, metavar="FILE.json", help="rate, verdicts, answers")
    return built


def main(argv: list[str] | None = None) -> int:
    """Runs the command and gives its exit code."""
    args = parser().parse_args(argv)
    _check(args)
    settings = _settings(args)
    prompts = _texts(args.prompts, "prompt") if args.prompts else None
    answers: dict[str, list[str]] = {}
    for words in args.answers:
        name, path = named_model(words)
        answers[name] = _texts(path, "answer", empty=True)
        asked = _texts(path, "prompt")
        prompts = prompts or asked
        if asked != prompts:
            raise DataError(
                f"{path}: its {len(asked)} prompts are not the {len(prompts)} of the others, in their order"
            )
    assert prompts is not None
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, (), args.seed)
    for words in args.models:
        name, path = named_model(words)
        with model_folder(path, args.cache) as folder:
            answers[name] = load_model(folder, settings).generate(prompts, sampling)
        print(f"{name}: {len(prompts)} answers", flush=True)
    (first, a), (second, b) = answers.items()
    duels = [Duel(*texts) for texts in zip(prompts, a, b, strict=True)]
    found = win_rate(duels, _judge(args, settings), seed=args.seed)
    _report(args, found, first, second, duels)
    return EXIT_DONE


def _settings(args: argparse.Namespace) -> HarnessSettings:
    dtype = args.dtype
    if args.models or args.judge_model:  # else no model is asked, and nothing is computed
        dtype, reason = choose_dtype(args.dtype, args.device)
        print(f"computing in {dtype}: {reason}", flush=True)
    return HarnessSettings(args.batch_size, dtype, args.device, seed=args.seed)


def _check(args: argparse.Namespace) -> None:
    names = [named_model(words)[0] for words in [*args.answers, *args.models]]
    if len(names) != 2 or names[0] == names[1]:
        raise ConfigError(f"{len(names)} models ({', '.join(names)}): give two of different names, NAME=PATH")
    if args.models and args.prompts is None:
        raise ConfigError("--model needs --prompts: what it is asked")
    if bool(args.judge) == bool(args.judge_model):
        raise ConfigError("say either --judge COMMAND or --judge-model FOLDER")
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.max_new_tokens < 1:
        raise ConfigError("--temperature at least 0, --top-p above 0 and at most 1, --max-new-tokens at least 1")


def _judge(args: argparse.Namespace, settings: HarnessSettings) -> Judge:
    if args.judge:
        return command_judge(args.judge, args.judge_seconds)
    return model_judge(load_model(args.judge_model, settings))


def _texts(path: Path, field: str, empty: bool = False) -> list[str]:
    """One field of every line. Raises DataError with file, line and field."""
    texts = []
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line.decode("utf-8"))
            text = row[field]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number}: no field {field}: {error!r}") from None
        if not isinstance(text, str) or not (text or empty):
            raise DataError(f"{path}, line {number}: field {field} must be a text" + ("" if empty else ", not empty"))
        texts.append(text)
    if not texts:
        raise DataError(f"{path}: no lines")
    return texts


def _report(args: argparse.Namespace, found: WinRate, first: str, second: str, duels: list[Duel]) -> None:
    record = {
        "format": 1,
        "models": [first, second],
        "judge": args.judge or f"bits a byte under {args.judge_model}",
        **{key: value for key, value in asdict(found).items() if key != "verdicts"},
        "items": [
            {"prompt": duel.prompt, "a": duel.a, "b": duel.b, "verdicts": list(verdicts)}
            for duel, verdicts in zip(duels, found.verdicts, strict=True)
        ],
    }
    write_record(args.output, record)
    chance = f"p = {found.p:.4f}" if found.p >= 0.0001 else "p < 0.0001"
    interval = f"95 % interval [{found.low:.3f}, {found.high:.3f}], {chance} (sign test, ties left out)"
    print(f"{first} against {second}: win rate {found.rate:.3f}, {interval}, {found.pairs:,} pairs")
    print(f"won {found.wins:,}, lost {found.losses:,}, tied or undecided {found.ties:,}")
    if found.pairs < FEW_ITEMS:
        print(
            f"warning: {found.pairs} pair(s) are few: below about {FEW_ITEMS} a win rate says little; give more prompts"
        )
    if found.first is not None:
        print(
            f"the judge took the first place {100 * found.first:.1f} % of the time (50 % without a favourite place); "
            f"in {found.by_place:,} pairs it took the same place in both orders"
        )
    print(f"written to {args.output}")
