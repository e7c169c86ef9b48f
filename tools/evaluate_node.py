"""The same as `stagemix evaluate_node`, from a source tree that need not be installed."""

import sys
from pathlib import Path

# the root instead of tools/, whose file names would hide packages (evaluate) that libraries import
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(entry for entry in sys.path if Path(entry).resolve() != HERE)]

from megatron.commands.evaluate_node import main  # noqa: E402
from megatron.commands.frame import run_command  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_command(main))
