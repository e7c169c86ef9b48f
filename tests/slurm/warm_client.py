"""Stands for a Python that `warm_server.py` forks: see there. Without TEST_WARM_SOCKET: that of TEST_COLD_PYTHON."""

import array
import contextlib
import json
import os
import signal
import socket
import sys

words = sys.argv[1:]
if "TEST_WARM_SOCKET" not in os.environ:
    os.execv(os.environ["TEST_COLD_PYTHON"], [os.environ["TEST_COLD_PYTHON"], *words])

handed_on = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGCONT)
signal.pthread_sigmask(signal.SIG_BLOCK, handed_on)
server = socket.socket(socket.AF_UNIX)
server.connect(os.environ["TEST_WARM_SOCKET"])
task = {"arguments": words, "cwd": os.getcwd(), "environment": dict(os.environ)}
data = json.dumps(task).encode() + b"\n"
files = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
sent = server.sendmsg([data], files)
server.sendall(data[sent:])
replies = server.makefile("r")
program = int(replies.readline())


def hand_on(number, frame):
    with contextlib.suppress(ProcessLookupError):
        os.kill(program, number)


for number in handed_on:
    signal.signal(number, hand_on)
signal.pthread_sigmask(signal.SIG_UNBLOCK, handed_on)
status = replies.readline()
if not status:
    os._exit(1)
code = os.waitstatus_to_exitcode(int(status))
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
