"""A Python that has the trainer loaded and forks: what `warm_python` runs. Loading torch in four ranks takes two cores
ten seconds or more at every start of a job.

    python warm_server.py SOCKET

The process that is forked is not a child of SLURM's step, but its stand-in there is the task in every way that shows:
signals go on to it, it ends when the stand-in does, a SIGKILL included, and its end is the stand-in's.
"""

from __future__ import annotations

import array
import contextlib
import importlib.util
import json
import os
import runpy
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LOADED = ("torch", "torch.distributed", "torch.distributed.fsdp", "megatron.trainer.session", "megatron.commands.train")


def serve(path: str) -> None:
    """Until standard input ends."""
    for name in LOADED:
        __import__(name)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)  # so that children can be waited for
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        threading.Thread(target=_end_with_starter, daemon=True).start()
        while True:
            asked, _ = listener.accept()
            if os.fork() == 0:
                _stand_for(listener, asked)
            asked.close()
            _forget_children()


def _end_with_starter() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)


def _forget_children() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _stand_for(listener: socket.socket, asked: socket.socket) -> None:
    """In a child: forks the program, and tells its stand-in how that ended."""
    listener.close()
    words, files = _received(asked)
    program = os.fork()
    if program == 0:
        _run(asked, words, files)
    for file in files:
        os.close(file)
    asked.sendall(f"{program}\n".encode())
    status = os.waitpid(program, 0)[1]
    with contextlib.suppress(OSError):  # the stand-in was killed
        asked.sendall(f"{status}\n".encode())
    os._exit(0)


def _received(asked: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """What is to be run, and its standard files."""
    files = array.array("i")
    data, ancillary, _, _ = asked.recvmsg(1 << 16, socket.CMSG_LEN(3 * files.itemsize))
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            files.frombytes(content)
    while not data.endswith(b"\n"):
        data += asked.recv(1 << 16)
    return json.loads(data), list(files)


def _run(asked: socket.socket, words: dict[str, Any], files: list[int]) -> None:
    code: object = 1
    try:
        for number, file in enumerate(files):
            os.dup2(file, number)
        os.setsid()
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.chdir(words["cwd"])
        os.environ.clear()
        os.environ.update(words["environment"])
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
        threading.Thread(target=_end_with, args=(asked,), daemon=True).start()
        _plant()
        code = _program(words["arguments"])
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _end_with(asked: socket.socket) -> None:
    while asked.recv(4096):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


def _plant() -> None:
    spec = importlib.util.spec_from_file_location("paced", HERE / "paced" / "sitecustomize.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.install()


def _program(arguments: list[str]) -> int:
    """`[-flags] FILE words…` or `[-flags] -m MODULE words…`."""
    place = 0
    while arguments[place].startswith("-") and arguments[place] != "-m":
        place += 1
    if arguments[place] == "-m":
        sys.argv = arguments[place + 1 :]
        runpy.run_module(arguments[place + 1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments[place:]
        runpy.run_path(arguments[place], run_name="__main__")
    return 0


if __name__ == "__main__":
    serve(sys.argv[1])
