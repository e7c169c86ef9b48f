"""The frame's contract: which exit code and which words a failure gives. Real processes where a stream is at stake."""

from __future__ import annotations

import argparse
import errno
import inspect
import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from megatron.commands.frame import config_arguments, load_from, run_command
from megatron.config import errors

DOCUMENTED = {
    errors.ConfigError: 2,
    errors.DataError: 3,
    errors.CheckpointError: 4,
    errors.ChangedPastError: 5,
    errors.UnavailableError: 6,
    errors.ProofError: 7,
    errors.NonFiniteError: 8,
    errors.StorageError: 74,
    errors.StopRequested: 75,
    errors.LostProcessError: 10,
}


def raising(error: BaseException) -> int:
    def main(argv: list[str] | None = None) -> int:
        raise error

    return run_command(main)


@pytest.mark.parametrize("kind, code", DOCUMENTED.items(), ids=lambda value: getattr(value, "__name__", str(value)))
def test_B1_an_error_for_the_user_is_one_message_and_its_code(
    kind: type[errors.StagemixError], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert raising(kind("corpus/a.jsonl:3: no field 'text'")) == code
    assert capsys.readouterr().err == "error: corpus/a.jsonl:3: no field 'text'\n"


def test_every_error_class_is_documented(repository: Path) -> None:
    classes = {value for value in vars(errors).values() if inspect.isclass(value)} - {errors.StagemixError}
    assert classes == set(DOCUMENTED)
    page = (repository / "docs" / "exit-codes.md").read_text(encoding="utf-8")
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")} | {130, 141}
    assert {int(line.split("|")[1]) for line in page.splitlines() if line[2:3].isdigit()} == codes


@pytest.mark.parametrize(
    "number",
    [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT, errno.EACCES, errno.ENOTDIR, errno.EEXIST, errno.EISDIR],
)
def test_B1_a_disk_that_cannot_be_written_gives_74(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(OSError(number, "reason", "runs/a/metrics.jsonl")) == 74
    message = capsys.readouterr().err
    assert message.startswith("error: runs/a/metrics.jsonl: reason: ")
    assert "Traceback" not in message


def test_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(ZeroDivisionError("of ours")) == 1
    assert "ZeroDivisionError: of ours" in capsys.readouterr().err
    assert raising(FileNotFoundError(errno.ENOENT, "gone", "x")) == 1


def test_interrupt_and_the_exits_of_argparse() -> None:
    assert raising(KeyboardInterrupt()) == 130
    assert raising(SystemExit(2)) == 2
    assert raising(SystemExit(None)) == 0
    assert raising(SystemExit("words")) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--schema"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_B1_output_to_a_full_disk_gives_74(stagemix_command: list[str], arguments: list[str], unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*stagemix_command, *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    assert done.returncode == 74, done.stderr
    assert done.stderr.startswith(b"error: ")
    assert b"Traceback" not in done.stderr


def test_a_reader_that_goes_away_is_no_error() -> None:
    program = (
        "import sys\nfrom megatron.commands.frame import run_command\n"
        "def main(argv=None):\n    while True: print('x' * 4096)\n"
        "sys.exit(run_command(main))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 141
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("words", [["plan", "examples/minimal.toml"], ["plan", "examples/minimal.toml", "--json"]])
def test_tables_for_a_reader_that_has_gone_away(
    words: list[str], stagemix_command: list[str], repository: Path
) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [*stagemix_command, *words], stdout=write, stderr=subprocess.PIPE, timeout=60, cwd=repository
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_config_and_overrides_reach_the_config(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        '[run]\nname = "a"\noutput = "o"\n[tokenizer]\npath = "bytes"\n[model]\nseq_length = 8\n'
        '[sources.code]\ntokens = "1M"\n[train]\nglobal_batch_size = 4\n'
        '[[stages]]\nname = "one"\nsteps = 3\nmixture = { code = 1 }\n',
        encoding="utf-8",
    )
    parser = argparse.ArgumentParser()
    config_arguments(parser)
    words = [str(path), "--set", "train.micro_batch_size=2", "--set", "stages.one.mixture.code=0.3"]
    config = load_from(parser.parse_args(words))
    assert config.train.micro_batch_size == 2
    assert config.stages[0].mixture == {"code": Decimal("0.3")}
