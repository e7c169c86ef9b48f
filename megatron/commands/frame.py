"""The frame around every command: its exit codes, how an error is shown, and the arguments that all share."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.config.errors import (
    EXIT_BROKEN_PIPE,
    EXIT_BUG,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_IO,
    EXIT_USAGE,
    IO_REMEDIES,
    StagemixError,
)
from megatron.launch.torchrun import tell_torchrun

if TYPE_CHECKING:
    from megatron.config.schema import RunConfig

Main = Callable[[list[str] | None], int]


def run_command(main_function: Main, argv: list[str] | None = None) -> int:
    """Runs a command's `main(argv)` and gives its exit code, whatever happens.

    An error written for the user is shown as one `error:` message without a traceback and gives its own code; a full,
    read-only or failing disk gives 74; Ctrl-C 130; argparse's own exits pass. Anything else is a bug: traceback and 1.
    """
    try:
        code = _code_of(main_function, argv)
        sys.stdout.flush()
        return code
    except StagemixError as error:
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:
        # the reader of a pipe (`| head`) has gone
        _give_up_output()
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.errno not in IO_REMEDIES:
            return _bug(error)
        _give_up_output()
        return _fail(f"{_describe(error)}: {IO_REMEDIES[error.errno]}", EXIT_IO)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except Exception as error:
        return _bug(error)


def _code_of(main_function: Main, argv: list[str] | None) -> int:
    try:
        return main_function(argv)
    except SystemExit as error:
        return _exit_code(error)


def _give_up_output() -> None:
    """Drops what standard output still holds if it can't be written: Python would try once more at its end, complain,
    and put an exit code of its own in the place of ours."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds CONFIG and the repeatable `--set KEY=VALUE`; `load_from` reads them."""
    parser.add_argument("config", metavar="CONFIG", type=Path, help="the run's TOML file (see examples/)")
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override one key of CONFIG, for example --set train.micro_batch_size=4 or "
        "--set stages.cooldown.tokens=5M; may be given more than once",
    )


def load_from(args: argparse.Namespace) -> RunConfig:
    """The config named on the command line, with its overrides applied. Raises ConfigError."""
    # Not at the top: commands without a config would wait a tenth of a second for pydantic.
    from megatron.config.load import load_config

    return load_config(args.config, args.overrides)


def _describe(error: OSError) -> str:
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename is not None else reason


def _fail(message: str, code: int) -> int:
    tell_torchrun(message)
    try:
        print(f"error: {message}", file=sys.stderr, flush=True)
    except OSError:
        return code
    return code


def _bug(error: Exception) -> int:
    tell_torchrun(f"{type(error).__name__}: {error}", trace=traceback.format_exc().rstrip())
    traceback.print_exc()
    return EXIT_BUG


def _exit_code(error: SystemExit) -> int:
    if error.code is None:
        return EXIT_DONE
    if isinstance(error.code, int):
        return error.code
    return _fail(str(error.code), EXIT_USAGE)
