"""`stagemix evaluate_node`: carries out what `stagemix study evaluate` asks of nodes, in one process."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from megatron.commands import evaluate, export_hf, generate, win_rate
from megatron.config.durable_files import write_whole
from megatron.config.errors import EXIT_BUG, EXIT_DONE, EXIT_IO, IO_REMEDIES, StagemixError
from megatron.config.load import load_config
from megatron.evaluation.held_out_text import held_out_documents
from megatron.evaluation.results import FORMAT, write_record
from megatron.evaluation.source_loss import document_losses, loss_record
from megatron.hf.checkpoint_source import open_source
from megatron.hf.rebuilt_decoder import RoundedWeights, whole_decoder
from megatron.launch.side_process import end_with_starter
from megatron.study.node_folder import NodeFolder
from megatron.study.node_parts import Evaluated, Part, Request, read_request
from megatron.study.node_questions import HELD_OUT_CONFIG
from megatron.study.node_results import LOSS

_HELD_OUT = 100_000
"""Documents of a source that are looked at most; what is measured is limited by tokens."""

EXAMPLE = """example:
  stagemix evaluate_node runs/study/nodes/*/evaluation-request.json
      what `stagemix study evaluate` asked of these nodes last, once more

exit codes: 0 done, 1 a bug, 2 unknown task or wrong options, 3 data that are wrong or missing, 4 damaged checkpoint,
6 a library is not installed, 7 an export that is not equal to its checkpoint, 74 disk; of several the first"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command and gives its exit code: that of the first part that failed."""
    parser = argparse.ArgumentParser(
        prog="stagemix evaluate_node",
        description="Exports and evaluates nodes of a study as their requests say. `stagemix study evaluate` writes "
        "requests and starts this.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("requests", nargs="+", type=Path, metavar="REQUEST", help="files that study evaluate wrote")
    parser.add_argument("--log", action="store_true", help="a line a part here, all else to a log beside each request")
    parser.add_argument("--ends-with-stdin", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.ends_with_stdin:
        end_with_starter()
    code = EXIT_DONE
    for path in args.requests:
        request = read_request(path)
        log = path.with_name(f"{path.stem.removesuffix('-request')}.log")
        with _told_to(log) if args.log else contextlib.nullcontext(sys.stdout) as speaker:
            code = _Work(request, speaker).every_part() or code
    return code


@contextlib.contextmanager
def _told_to(log: Path) -> Iterator[TextIO]:
    """Standard output and error of this process, libraries below Python included, go to the file; what is given goes
    where standard output went before."""
    sys.stdout.flush()
    kept = [os.dup(number) for number in (1, 2)]
    told = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        for number in (1, 2):
            os.dup2(told, number)
        with open(kept[0], "w", closefd=False, encoding="utf-8", errors="replace") as speaker:
            yield speaker
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, before in zip((1, 2), kept, strict=True):
            os.dup2(before, number)
        for descriptor in (*kept, told):
            os.close(descriptor)


@dataclass(frozen=True)
class _Work:
    request: Request
    speaker: TextIO

    def every_part(self) -> int:
        """Gives the code of the first part that failed. What needs the export is not tried where that failed."""
        folder = NodeFolder(Path(self.request.folder))
        done, code, no_export = Evaluated(folder), EXIT_DONE, EXIT_DONE
        for part in self.request.parts:
            done.forget(part)
        for part in self.request.parts:
            title = f"{self.request.name} {self.request.node[:8]}: {part.name}"
            if no_export and part.kind in _OF_THE_EXPORT:
                done.failed(part, no_export, "it needs the export, which failed")
                continue
            print(f"── {title}", flush=True)
            began = time.monotonic()
            try:
                words = _KINDS[part.kind](self, part, folder)
            except Exception as error:
                failed = _code_of(error)
                done.failed(part, failed, f"{error}")
                print(f"{title}: failed (exit code {failed}): error: {error}", file=self.speaker, flush=True)
                code = code or failed
                if failed == EXIT_IO:  # nothing else can be written either
                    return code
                no_export = failed if part.kind == "export" else no_export
                continue
            seconds = time.monotonic() - began
            done.done(part, seconds)
            print(f"{title}: {seconds:.1f} s{words and '; '}{words}", file=self.speaker, flush=True)
        return code

    def export(self, part: Part, folder: NodeFolder) -> str:
        """The Hugging Face folder, proven before it is there."""
        _must(
            export_hf.main, [f"--input={self.request.checkpoint}", f"--output={folder.path / part.file}", *part.words]
        )
        return "proven"

    def loss(self, part: Part, folder: NodeFolder) -> str:
        """Losses by source, of the checkpoint itself."""
        import torch

        asked = part.settings
        config = load_config(folder.path / HELD_OUT_CONFIG)
        chosen = {name: section for name, section in config.sources.items() if name in asked["sources"]}
        config = config.model_copy(update={"sources": chosen})
        source = open_source(Path(self.request.checkpoint))
        assert source.tokenizer is not None, "a checkpoint of a run has a tokenizer"
        length = min(int(asked["seq_length"]), source.shape.max_position_embeddings)
        longest = max(length + 1, int(asked["tokens"]) // 50)
        documents = held_out_documents(config, source.tokenizer, _HELD_OUT, longest, int(asked["tokens"]))
        dtype = getattr(torch, asked["dtype"])
        model = whole_decoder(source.shape, RoundedWeights(source.ref.model(), dtype)).to(asked["device"], dtype)
        began = time.monotonic()
        losses = {
            name: document_losses(model, rows, length, int(asked["batch_size"])) for name, rows in documents.items()
        }
        record = loss_record(self.request.name, documents, losses, source.tokenizer, asked["groups"])
        record["models"][0] |= {"path": self.request.checkpoint, "seconds": round(time.monotonic() - began, 3)}
        head = {"format": FORMAT, "suite": LOSS, "harness": "", "dtype": asked["dtype"], "device": asked["device"]}
        write_record(folder.path / part.file, {**head, "seed": 0, "limit": None, **record})
        found = record["models"][0]["results"].items()
        return ", ".join(f"{name} {result['metrics']['loss']['value']:.4f}" for name, result in found) + " nats a token"

    def suite(self, part: Part, folder: NodeFolder) -> str:
        """A suite on the exported folder, as `stagemix evaluate` runs it."""
        output = folder.path / part.file
        words = [f"--model={self.request.name}={folder.export}", f"--output={output}", *part.words]
        if "--suite=heldout" in part.words:
            words.append(f"--config={folder.path / HELD_OUT_CONFIG}")
        try:
            _must(evaluate.main, words)
        finally:
            shutil.rmtree(output.parent / f"{output.stem}-tasks", ignore_errors=True)
        return part.file

    def generated(self, part: Part, folder: NodeFolder) -> str:
        """Texts by `stagemix generate`, a line each, with what they were generated by."""
        told = io.StringIO()
        with tempfile.TemporaryDirectory(prefix="stagemix-prompts-") as scratch:
            prompts = Path(scratch) / "prompts.jsonl"
            lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in part.settings["prompts"]]
            prompts.write_text("".join(lines), encoding="utf-8")
            with contextlib.redirect_stdout(told):
                _must(generate.main, [f"--model={folder.export}", f"--prompts={prompts}", *part.words])
        rows = [json.loads(line) for line in told.getvalue().splitlines() if line]
        settings = _settings(part.words)
        for row in rows:
            row |= {"answer": row["text"], "settings": settings}  # "answer" is what win_rate reads
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_whole(folder.path / part.file, content.encode())
        return f"{len(rows)} texts"

    def judged(self, part: Part, folder: NodeFolder) -> str:
        """A duel, as `stagemix win_rate` has it judged."""
        _must(win_rate.main, [*part.words, f"--output={folder.path / part.file}"])
        return part.file


_KINDS: dict[str, Callable[[_Work, Part, NodeFolder], str]] = {
    "export": _Work.export,
    "loss": _Work.loss,
    "suite": _Work.suite,
    "generate": _Work.generated,
    "judge": _Work.judged,
}


_OF_THE_EXPORT = ("suite", "generate")
"""Kinds of parts that are asked of the exported folder; losses are of the checkpoint itself."""


def _must(command: Callable[[list[str]], int], words: list[str]) -> None:
    """Runs a command of ours in this process. Raises what it raises."""
    try:
        code = command(words)
    except SystemExit as error:
        raise RuntimeError(f"{' '.join(words)}: argparse refused these arguments ({error})") from None
    if code:
        raise RuntimeError(f"{' '.join(words)}: exit code {code}")


def _code_of(error: Exception) -> int:
    if isinstance(error, StagemixError):
        return error.exit_code
    if isinstance(error, OSError) and error.errno in IO_REMEDIES:
        return EXIT_IO
    traceback.print_exc()
    return EXIT_BUG


def _settings(words: tuple[str, ...]) -> dict[str, str]:
    """Options of generate by their names."""
    return {name.removeprefix("--"): value for name, _, value in (word.partition("=") for word in words) if value}
