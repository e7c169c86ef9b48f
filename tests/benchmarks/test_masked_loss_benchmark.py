"""The benchmark of masked stages runs, and compares the same inputs with fewer targets."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import masked_loss


def test_both_sides_take_the_same_samples(tmp_path: Path) -> None:
    arguments = argparse.Namespace(
        preset="llama-tiny", vocabulary=257, seq_length=32, global_batch_size=4, micro_batch_size=2, precision="fp32",
        marked=0.3, tokens=4000, rounds=2,
    )  # fmt: skip
    rows = masked_loss.measure(arguments, tmp_path)
    assert rows["instruction"]["targets"] < 0.6 * rows["pre-training"]["targets"]
    assert all(row["cpu"] > 0 and row["best"] <= row["wall"] for row in rows.values())
