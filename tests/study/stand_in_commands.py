"""Stand-ins for `train`, `average_checkpoints` and `study evaluate`, which start in a moment because nothing learns.

What a study sees of a run is real: claims, records of starts and ends, the order of samples, ledgers, index files,
metrics, checkpoints with manifests, signals, what a resume refuses. "weights" in state.json is a hash of all that was
trained on, in order, so that two runs that trained the same have the same. From the environment: STAND_IN_STEP, seconds
of a step; STAND_IN_FAULT, "PART OF THE RUN'S NAME:CODE".
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from megatron.checkpoint.manifest import check_bytes, manifest_bytes, read_manifest, sha256_of
from megatron.config.errors import StagemixError
from megatron.config.load import load_config
from megatron.data.ledger import Ledger
from megatron.data.sources import TokenizerIdentity
from megatron.launch.attempts import End, Launch, Start, append_event, exit_words, read_attempts
from megatron.launch.run_checkpoints import checkpoint_at, newest_checkpoints
from megatron.metrics.sinks import JsonlSink, cut_after
from megatron.planner.resolve import resolve_run
from megatron.tokenizers.load import load_tokenizer

STEP_SECONDS = float(os.environ.get("STAND_IN_STEP", "0"))
FAULT, _, CODE = os.environ.get("STAND_IN_FAULT", "").partition(":")


def main(words: list[str]) -> int:
    """One of our commands, by its words."""
    try:
        if words[0] == "train":
            return Training(words[1:]).run()
        if words[0] == "average_checkpoints":
            return average(words[1:])
        assert words[:2] == ["study", "evaluate"], words
        return evaluate(words[2:])
    except StagemixError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


class Training:
    """A run of one process."""

    def __init__(self, words: list[str]) -> None:
        self.config = load_config(Path(words[0]))
        self.resume_from = Path(words[2]) if len(words) > 2 else None
        self.output = Path(self.config.run.output)
        self.asked = False

    def run(self) -> int:
        """Trains; the exit code."""
        self.output.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.output / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("error: another process is training there", file=sys.stderr)
            return 2
        before = signal.signal(signal.SIGTERM, self._ask)
        (self.output / "exit.json").unlink(missing_ok=True)
        number = max((one.number for one in read_attempts(self.output)), default=0) + 1
        host = os.uname().nodename
        append_event(self.output, Launch(number, time.time(), host, [host], os.getpid()))
        code, reason = 1, ""
        try:
            code, reason = self._train(number, host)
            return code
        except StagemixError as error:
            code, reason = error.exit_code, str(error)
            raise
        finally:
            end = End(number, time.time(), code, reason)
            append_event(self.output, end)
            (self.output / "exit.json").write_text(exit_words(end))
            signal.signal(signal.SIGTERM, before)
            os.close(lock)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True

    def _train(self, number: int, host: str) -> tuple[int, str]:
        if FAULT and FAULT in self.config.run.name:
            print("error: this node was told to fail", file=sys.stderr, flush=True)
            return int(CODE), "this node was told to fail"
        state = self._found()
        ledger = Ledger.from_json(state["data"]) if state else None
        tokenizer = TokenizerIdentity.of(load_tokenizer(self.config.tokenizer.path))
        resolved = resolve_run(self.config, ledger=ledger, tokenizer=tokenizer)
        step, weights = state.get("step", 0), state.get("weights", "")
        cut_after(self.output / "metrics.jsonl", step)
        append_event(self.output, Start(number, time.time(), host, [host], os.getpid(), step=step))
        sink, stream, every = JsonlSink(self.output / "metrics.jsonl"), resolved.stream(), self.config.checkpoint.every
        while not stream.finished:
            if self.asked:
                self._save(step, stream.ledger, weights)
                return 75, "SIGTERM"
            before, stage = stream.ledger.consumed_tokens, stream.training_stage().name
            samples = stream.next_batch()
            weights = hashlib.sha256(f"{weights} {stage} {stream.ledger.order_hash}".encode()).hexdigest()
            step += 1
            time.sleep(STEP_SECONDS)
            tokens = stream.ledger.consumed_tokens
            row = {"step": step, "training_stage": stage, "consumed_tokens": tokens, "tokens": tokens - before}
            sink.write({**row, "loss": 5 - step / 1000, "step_seconds": STEP_SECONDS + 1e-6, "samples": len(samples)})
            kept = stream.finished or step in self.config.checkpoint.keep_steps
            if step % every == 0 or kept:
                self._save(step, stream.ledger, weights, kept)
        return 0, "complete"

    def _found(self) -> dict[str, Any]:
        """state.json of what it goes on from."""
        own = [one for one in newest_checkpoints(self.output)[0] if not one.fault]
        if own:
            check(own[0].path)
            return own[0].state
        if self.resume_from is None:
            return {}
        found = checkpoint_at(self.resume_from)
        assert found is not None and not found.fault, self.resume_from
        check(found.path)
        aside = self.output / "checkpoints" / ".aside"
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(found.path, aside)
        aside.rename(aside.with_name(found.path.name))
        return found.state

    def _save(self, step: int, ledger: Ledger, weights: str, kept: bool = False) -> None:
        save(self.output / "checkpoints" / f"step-{step:09d}", step, ledger.to_json(), weights, kept)
        old = sorted((self.output / "checkpoints").glob("step-*"))
        passing = [path for path in old if not json.loads((path / "manifest.json").read_text())["keep_forever"]]
        for path in passing[: -self.config.checkpoint.keep]:
            shutil.rmtree(path)


def save(path: Path, step: int, data: dict[str, Any], weights: str, kept: bool) -> None:
    """A checkpoint that is there whole or not at all."""
    aside = path.with_name(f".{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    state = {"step": step, "consumed_tokens": data["consumed_tokens"], "data": data, "weights": weights}
    (aside / "state.json").write_text(json.dumps(state))
    seal = {"bytes": (aside / "state.json").stat().st_size, "sha256": sha256_of(aside / "state.json")}
    files = {"state.json": seal}
    manifest = {"format": 2, "step": step, "keep_forever": kept, "files": files, "tensors": {}}
    (aside / "manifest.json").write_bytes(manifest_bytes(manifest))
    shutil.rmtree(path, ignore_errors=True)
    aside.rename(path)


def check(path: Path) -> None:
    """Reads a checkpoint as whoever uses it does. Raises CheckpointError where bytes are others than were written."""
    files = read_manifest(path)["files"]
    check_bytes(path, files, sorted(files))


def average(words: list[str]) -> int:
    """Of the checkpoints that the words name."""
    options = list(zip(words[::2], words[1::2], strict=True))
    output = next(Path(value) for name, value in options if name == "--output")
    members = [checkpoint_at(Path(value)) for name, value in options if name == "--checkpoint"]
    shares = [value for name, value in options if name == "--weight"]
    states = [member.state for member in members if member is not None and not member.fault]
    assert len(states) == len(members) == len(shares), words
    for member in members:
        check(member.path)  # type: ignore[union-attr]
    parts = sorted(f"{state['weights']} {share}" for state, share in zip(states, shares, strict=True))
    weights = hashlib.sha256(" ".join(parts).encode()).hexdigest()
    save(output, states[0]["step"], states[0]["data"], weights, True)
    return 0


def evaluate(words: list[str]) -> int:
    """results.json of nodes."""
    from megatron.study.node_config import node_folder
    from megatron.study.node_parts import EVALUATION_LOG, Evaluated, Part
    from megatron.study.node_results import NodeResults, write_results
    from megatron.study.node_state import trained_checkpoint
    from megatron.study.plan import plan_study

    planned, code = plan_study(Path(words[0])), 0
    for node in (words[n + 1] for n, word in enumerate(words) if word == "--node"):
        found = trained_checkpoint(planned, node)
        assert found is not None, node
        folder, label = node_folder(planned, node), planned.graph.nodes[node].label
        done, part = Evaluated(folder), Part("export", "export", node, "export.txt")
        (folder.path / EVALUATION_LOG).write_text(f"the log of {label}\n")
        try:
            check(found.path)
            if FAULT and FAULT in f"evaluate-{label}":
                raise Told(f"{label} was told to fail")
        except StagemixError as error:
            done.failed(part, error.exit_code, str(error))
            code = code or error.exit_code
            continue
        (folder.path / part.file).write_text("exported")
        done.done(part, 3000.0 + found.step)
        weights, at = str(found.state["weights"]), found.path.relative_to(folder.path).as_posix()
        write_results(
            folder.results, NodeResults(node, label, 7, (), 0, at, weights, part.file, (), {}, {}, None, asked={})
        )
    return code


class Told(StagemixError):
    """With the exit code that STAND_IN_FAULT says."""

    exit_code = int(CODE or 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
