"""Programs of a model behind walls: what they try fails as a failed program, and touches nothing.

Each trap is a program that tries, and whose function then answers rightly: without the wall its tests would pass.
"""

from __future__ import annotations

import http.server
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron.config.errors import UnavailableError
from megatron.evaluation import sandbox
from megatron.evaluation.sandbox import Outcome, SandboxLimits, require_sandbox, run_program, run_programs

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"), reason="walls are Linux's"
)

QUICK = SandboxLimits(seconds=1, memory=1 << 28)
RIGHT = "\ndef f(x):\n    return x + 1\n"
TESTS = "assert f(1) == 2\nassert f(-1) == 0\n"


def fails(program: str, reason: str, limits: SandboxLimits = QUICK) -> None:
    outcome = run_program(program + RIGHT, TESTS, limits)
    assert not outcome.passed and reason in outcome.reason, outcome


def test_a_right_program_passes_and_a_wrong_one_says_why() -> None:
    assert run_program(RIGHT, TESTS) == Outcome(True, "")
    assert run_program("def f(x):\n    return x\n", TESTS) == Outcome(False, "AssertionError")
    assert run_program("def f(x)\n", TESTS).reason.startswith("SyntaxError")
    assert run_program("", TESTS).reason == "NameError: name 'f' is not defined"


def test_what_programs_need_is_there() -> None:
    libraries = "math, re, heapq, itertools, collections, random, datetime, decimal, hashlib, json, string, typing"
    thread = "import threading\nfound = []\nt = threading.Thread(target=lambda: found.append(1))\nt.start(); t.join()\n"
    record = "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 1\n"
    answer = "def f(x):\n    return x + A().x * len(found)\n"
    assert run_program(f"import {libraries}\n{thread}{record}{answer}", TESTS).passed
    assert run_program("import sys, os\nsys.setrecursionlimit(9000)\nprint(os.listdir('.'))" + RIGHT, TESTS).passed
    assert run_program("# ü 你 \ud800\nx = '\\ud800'" + RIGHT, TESTS).reason.startswith("UnicodeEncodeError")


def test_exit_before_the_asserts_is_a_failure() -> None:
    fails("import sys\nsys.exit(0)", "SystemExit")
    fails("exit(0)", "NameError")  # a word of the interactive interpreter, which is not there
    fails("raise SystemExit", "SystemExit")
    fails("import os\nos._exit(0)", "ended before its tests did")
    fails("import os\nos.abort()", "killed by")
    assert not run_program("def f(x):\n    import os\n    os._exit(0)\n", TESTS).passed
    assert not run_program(
        "import atexit, os\natexit.register(lambda: os._exit(0))\nraise KeyboardInterrupt", ""
    ).passed


def test_tests_cannot_be_swallowed_or_answered_for() -> None:
    fails("'''", "SyntaxError")
    assert run_program("def f(x):\n    return 0\nif False:\n    pass", TESTS).reason == "AssertionError"
    assert run_program("def f(x):\n    return 0\n\\", TESTS).passed is False
    everywhere = (
        "import os\nfor n in range(3, 60):\n    try:\n        os.write(n, {})\n    except OSError:\n        pass\n"
    )
    fails(everywhere.format("b'{}' * 99999"), "wrote where only its result is told")
    says = everywhere.format("""b'{"error": ""}'""") + "os._exit(0)\n"
    assert not run_program(says, TESTS).passed


def test_infinite_loop_ends_with_the_time_limit() -> None:
    began = time.monotonic()
    fails("while True:\n    pass", "time limit")
    fails("try:\n    while True: pass\nexcept BaseException:\n    while True: pass", "time limit")
    assert time.monotonic() - began < 60


def test_a_sleeper_ends_with_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_WALL_CLOCK", 0.5)
    fails("import time\ntime.sleep(3600)", "time limit")
    fails("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nsignal.pause()", "time limit")


def test_memory_bomb_ends_with_the_memory_limit() -> None:
    fails("x = bytearray(10**10)", "MemoryError")
    fails("x = []\nwhile True:\n    x.append(bytearray(10**7))", "MemoryError")


def test_fork_bomb_starts_nothing() -> None:
    fails("import os\nwhile True:\n    os.fork()", "PermissionError")
    fails("import subprocess\nsubprocess.run(['true'])", "PermissionError")
    fails("import os\nos.execv('/bin/true', ['true'])", "PermissionError")
    fails("import multiprocessing as m\np = m.Process(target=print)\np.start()", "PermissionError")


def test_network_is_out_of_reach() -> None:
    fails("import socket\nsocket.socket()", "PermissionError")
    fails("import socket\nsocket.socket(socket.AF_UNIX)", "PermissionError")
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.handle_request, daemon=True).start()
    try:
        fails(
            f"import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{server.server_port}')", "not permitted"
        )
    finally:
        server.server_close()


def test_no_file_is_written_renamed_or_removed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    tmp_path.chmod(0o777)
    kept.chmod(0o666)
    for program in (
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"open({str(kept)!r}, 'w')",
        f"open({str(kept)!r}, 'r+')",
        f"open({str(kept)!r}, 'a')",
        "open('here', 'w')",
        f"import os\nos.remove({str(kept)!r})",
        f"import os\nos.rename({str(kept)!r}, {str(kept) + '2'!r})",
        f"import os\nos.symlink('/', {str(tmp_path / 'link')!r})",
        f"import os\nos.mkdir({str(tmp_path / 'folder')!r})",
        f"import os\nos.truncate({str(kept)!r}, 0)",
        f"import os\nos.chmod({str(kept)!r}, 0)",
        f"import shutil\nshutil.rmtree({str(tmp_path)!r})",
    ):
        fails(program, "PermissionError")
    assert kept.read_text() == "as it was" and [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert kept.stat().st_mode & 0o777 == 0o666


def test_no_process_is_signalled_and_no_limit_raised() -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        fails(f"import os\nos.kill({bystander.pid}, 9)", "")
        fails("import os\nos.kill(os.getppid(), 9)", "")
        fails(f"import os\nos.kill({os.getpid()}, 9)", "")
        fails("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (9000, 9000))", "")
        fails("import os\nos.setuid(0)\nos.setpriority(0, 0, -5)", "")
        assert bystander.poll() is None
    finally:
        bystander.send_signal(signal.SIGKILL)
        bystander.wait()


def test_printing_megabytes_is_no_matter() -> None:
    assert run_program("print('x' * 10**8)" + RIGHT, TESTS).passed
    assert run_program("import sys\nsys.stderr.write('x' * 10**7)" + RIGHT, TESTS).passed
    fails("raise ValueError('x' * 10**8)", "ValueError: xxx")
    fails("class E(Exception):\n    def __str__(self):\n        return str(self)\nraise E()", "cannot be shown")


def test_the_environment_is_empty_and_so_is_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_USER", "1")
    check = "import os, sys\nassert 'SECRET_OF_THE_USER' not in os.environ\nassert os.listdir('.') == []\n"
    check += "assert sys.stdin.read() == ''\nassert not any('stagemix' in m or 'megatron' in m for m in sys.modules)\n"
    assert run_program(check + RIGHT, TESTS) == Outcome(True, "")


def test_a_crash_of_the_interpreter_is_a_failure() -> None:
    fails("import ctypes\nctypes.string_at(0)", "killed by SIGSEGV")


def test_several_at_a_time_keep_their_order() -> None:
    programs = [(f"def f(x):\n    return x + {n}\n", TESTS) for n in (0, 1, 2, 1)]
    assert [one.passed for one in run_programs(programs, QUICK, jobs=2)] == [False, True, False, True]


def test_T3_without_the_filter_nothing_is_run() -> None:
    assert {"limits", "seccomp"} <= set(require_sandbox())
    with pytest.raises(UnavailableError, match="no system call filter"):
        run_program(RIGHT, TESTS, QUICK, walls=("namespaces",))
    assert run_program(RIGHT, TESTS, QUICK, walls=("seccomp",)).passed
    assert not run_program("import socket\nsocket.socket()" + RIGHT, TESTS, QUICK, walls=("seccomp",)).passed
