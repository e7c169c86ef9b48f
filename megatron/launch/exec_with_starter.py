"""Run as a script, `exec_with_starter.py PID COMMAND …`: becomes the command, which the kernel sends SIGTERM when its
starter, the process PID, is gone. By itself and without the site's packages, since every process of a study begins so.

Where the kernel cannot do that (no Linux), the command outlives who started it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Does not return."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    except (OSError, AttributeError):
        pass
    else:
        if os.getppid() != int(sys.argv[1]):  # gone before that was said
            sys.exit(128 + signal.SIGTERM)
    os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
