"""What a process knows of its launcher before torch is loaded, and what torchrun shows of how it ended.

torchrun gives each process a file to write its error to, and shows the one with the smallest time as "Root Cause"; of a
process that wrote none it shows the exit code alone. The format is read by torch.distributed.elastic.multiprocessing.
errors.ProcessFailure: whole seconds, as a string; "py_callstack", where it is there, in place of the message.
"""

from __future__ import annotations

import contextlib
import json
import os
import time

RANK_VARIABLES = ("RANK", "SLURM_PROCID")
"""Those by which `parallel/mesh.py` knows a launcher."""


def may_be_one_of_several() -> bool:
    """Whether a launcher's variable is set: without any, this is the only process. The mesh, which needs torch, knows
    for certain."""
    return any(name in os.environ for name in RANK_VARIABLES)


def tell_torchrun(message: str, when: int | None = None, trace: str = "") -> None:
    """Leaves the reason of this process's end where torchrun looks for it; nothing where torchrun did not start it.

    when: seconds since 1970, now where absent. trace: shown instead of the message, for a bug.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    more = {"timestamp": str(int(time.time()) if when is None else when)}
    if trace:
        more["py_callstack"] = trace
    aside = f"{path}.tmp"
    # A half-written file would be torchrun's own traceback; none at all is only less to read.
    with contextlib.suppress(OSError):
        with open(aside, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": message, "extraInfo": more}}, file)
        os.replace(aside, path)
