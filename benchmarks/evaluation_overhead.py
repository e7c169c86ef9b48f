"""Evaluation on CPU: the whole command against `lm_eval` itself, on the same folder and the same local task files.

Each is a process of its own, from start to results file, taken in turns; medians of wall-clock and of processor time.
The model is a random Llama of the demo's size; the tasks are those of the suite heldout, from the standard library's
files. Then, in one process, what stands between HFLM and a results file: `run_tasks` against `simple_evaluate` over the
same loaded model; and how many programs a second the sandbox runs.

    python benchmarks/evaluation_overhead.py                        # 100 questions, three rounds
    python benchmarks/evaluation_overhead.py --questions 300 --rounds 5 --json evaluation.json

The peer gets HF_HUB_OFFLINE, as it would ask the network otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import lm_eval
import torch
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.evaluation.harness import HarnessSettings, load_model, run_tasks
from megatron.evaluation.sandbox import SandboxLimits, run_programs
from megatron.evaluation.task_files import write_held_out_tasks

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("heldout_library", "heldout_library_loss")


def library(files: int) -> list[str]:
    """Texts of the standard library's own modules."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [path.read_text(encoding="utf-8") for path in paths[:files]]


def make_model(folder: Path, texts: list[str], width: int, layers: int) -> int:
    """Writes a random Llama with a byte-level tokenizer trained on `texts`; gives its number of parameters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=8192, special_tokens=["<|end|>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    end = {"eos_token": "<|end|>", "bos_token": "<|end|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **end).save_pretrained(folder)
    torch.manual_seed(1)
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        )
    )
    network.save_pretrained(folder)
    return sum(parameter.numel() for parameter in network.parameters())


def timed(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """(wall-clock, processor) seconds of a process and of those it waited for. Raises RuntimeError where it failed."""
    began = time.perf_counter()
    child = os.posix_spawnp(
        command[0],
        command,
        environment,
        file_actions=[(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_WRONLY, 0) for stream in (1, 2)],
    )
    _, status, used = os.wait4(child, 0)
    if status != 0:
        raise RuntimeError(f"{' '.join(command)} ended with status {status}")
    return time.perf_counter() - began, used.ru_utime + used.ru_stime


def commands(folder: Path, arguments: argparse.Namespace) -> dict[str, list[str]]:
    """The two command lines."""
    tasks = ",".join(TASKS)
    theirs = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", tasks, "--device", "cpu", "--log_samples"]
    theirs += ["--model_args", f"pretrained={folder / 'model'},dtype=float32", "--include_path", str(folder / "tasks")]
    theirs += ["--batch_size", str(arguments.batch_size), "--output_path", str(folder / "theirs")]
    ours = [sys.executable, str(ROOT / "tools" / "evaluate.py"), "--model", str(folder / "model"), "--tasks", tasks]
    ours += ["--include-path", str(folder / "tasks"), "--dtype", "float32"]
    ours += ["--batch-size", str(arguments.batch_size), "--output", str(folder / "ours.json")]
    return {"lm_eval": theirs, "stagemix evaluate": ours}


def in_turns(sides: dict[str, Callable[[], tuple[float, float]]], rounds: int) -> dict[str, dict[str, float]]:
    """Medians of both times of each side."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            taken[name].append(run())
            print(f"  {name}: {taken[name][-1][0]:.2f} s, {taken[name][-1][1]:.2f} s of processor", flush=True)
    return {
        name: {"wall": statistics.median(t[0] for t in times), "processor": statistics.median(t[1] for t in times)}
        for name, times in taken.items()
    }


def inside(call: Callable[[], object]) -> Callable[[], tuple[float, float]]:
    """Times a call of this process."""

    def run() -> tuple[float, float]:
        wall, processor = time.perf_counter(), time.process_time()
        call()
        return time.perf_counter() - wall, time.process_time() - processor

    return run


def bridge(folder: Path, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """`run_tasks` against the harness' own function over the same loaded model."""
    settings = HarnessSettings(arguments.batch_size, "float32")
    model = load_model(folder / "model", settings)
    include = folder / "tasks"

    def bare() -> object:
        manager = TaskManager(include_path=str(include), include_defaults=False)
        return lm_eval.simple_evaluate(
            model=model.inner, tasks=list(TASKS), task_manager=manager, batch_size=arguments.batch_size
        )

    sides = {
        "simple_evaluate": inside(bare),
        "run_tasks": inside(lambda: run_tasks(model, TASKS, include, settings)),
    }
    return in_turns(sides, arguments.rounds)


def sandbox_rate(programs: int) -> float:
    """Programs a second, one at a time: a function of one line and its test."""
    began = time.perf_counter()
    outcomes = run_programs([("def f(x):\n    return x + 1\n", "assert f(1) == 2\n")] * programs, SandboxLimits())
    assert all(outcome.passed for outcome in outcomes)
    return programs / (time.perf_counter() - began)


def main() -> None:
    """Prints the medians and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="stagemix-benchmark-") as scratch:
        folder = Path(scratch)
        texts = library(60)
        parameters = make_model(folder / "model", texts, arguments.width, arguments.layers)
        write_held_out_tasks(folder / "tasks", {"library": texts}, arguments.questions, 20_000)
        environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
        lines = {
            name: (lambda words=words: timed(words, environment)) for name, words in commands(folder, arguments).items()
        }
        found = {
            "parameters": parameters,
            "command": in_turns(lines, arguments.rounds),
            "bridge": bridge(folder, arguments),
            "programs_a_second": sandbox_rate(40),
        }
    for title, mine, theirs in (
        ("command", "stagemix evaluate", "lm_eval"),
        ("bridge", "run_tasks", "simple_evaluate"),
    ):
        both = found[title]
        for clock in ("wall", "processor"):
            ours, peer = both[mine][clock], both[theirs][clock]
            print(f"{title}, {clock}: {mine} {ours:.2f} s, {theirs} {peer:.2f} s, ratio {ours / peer:.2f}")
    print(f"sandbox: {found['programs_a_second']:.0f} programs a second, one at a time")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
