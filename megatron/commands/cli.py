"""`stagemix COMMAND …`: finds the command and imports no other, so that planning never waits for torch."""

from __future__ import annotations

import difflib
import importlib
import sys

from megatron.config.errors import EXIT_DONE, ConfigError
from megatron.config.version import VERSION

COMMANDS = {
    "train_tokenizer": "train a SentencePiece or byte-level BPE tokenizer on raw corpora",
    "preprocess_data": "turn raw corpora into indexed token files (.bin, .idx, .json)",
    "merge_data": "publish the dataset whose shards preprocess_data made on several nodes",
    "plan": "print what a config would train on, stage by stage, without torch or data",
    "study": "plan, run, evaluate and report arms of training stages that share trunks, from one file",
    "inspect_data": "list the very samples that a run consumes: source, epoch, documents, text",
    "train": "train, or resume, the run of a config",
    "launch_slurm": "write a batch script for SLURM that trains, resumes and requeues a run, and submit it",
    "ledger": "show what a checkpoint has been trained on, or compare two",
    "import_hf": "turn a Hugging Face folder into a checkpoint to train on from",
    "import_megatron": "turn a checkpoint of Megatron-LM or GPT-NeoX into one of ours",
    "export_megatron": "write a checkpoint as Megatron-LM's classic files, at any tensor and pipeline sizes",
    "export_hf": "turn a checkpoint into a Hugging Face folder and prove that it equals our model",
    "average_checkpoints": "average the weights of checkpoints into one checkpoint",
    "evaluate": "evaluate models on held-out text, suites of tasks, or tasks of lm-evaluation-harness",
    "evaluate_node": "export and evaluate nodes of a study, as study evaluate asks",
    "generate": "show what a model goes on to say: continuations of prompts",
    "compare": "compare evaluated models item by item: differences, intervals, p-values",
    "win_rate": "ask a judge which of two models answers better, in both orders",
    "status": "show where runs are: progress, time left, checkpoints, restarts, goodput",
    "requeue": "put a batch job back in SLURM's queue where that is of use, without bad nodes",
    "report": "write report.html, one self-contained file about a run",
}


def main(argv: list[str] | None = None) -> int:
    """Runs `COMMAND ARGUMENTS…` and gives its exit code. Dashes in a command's name stand for underscores."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return EXIT_DONE
    if words[0] in ("-V", "--version"):
        print(f"stagemix {VERSION}")
        return EXIT_DONE
    module = importlib.import_module(f"megatron.commands.{command_named(words[0])}")
    code: int = module.main(words[1:])
    return code


def command_named(word: str) -> str:
    """The command that `word` names. Raises ConfigError with the nearest name for any other."""
    name = word.replace("-", "_")
    if name in COMMANDS:
        return name
    near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(COMMANDS)}"
    raise ConfigError(f"unknown command {word!r}: {hint}")


def overview() -> str:
    """What `stagemix --help` prints."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: stagemix COMMAND [ARGUMENTS…]",
            "",
            "Trains language models on mixtures of code and text that change by training stage.",
            "",
            "commands:",
            *(f"  {name:<{width}}  {line}" for name, line in COMMANDS.items()),
            "",
            "`stagemix COMMAND --help` explains one of them; `stagemix --version` prints the version.",
        ]
    )


def entry() -> int:
    """The console script `stagemix`."""
    # not at the top: worker processes import this module too, and the frame brings the whole config
    from megatron.commands.frame import run_command

    return run_command(main)


if __name__ == "__main__":
    sys.exit(entry())
