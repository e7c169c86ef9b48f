"""Training while sequence length and batch change inside a stage and documents are rearranged: exact over a kill."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from tiny_run import curve_of, make_run, rows_of, train

from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.planner.ledger_files import read_ledger
from megatron.tokenizers.load import load_tokenizer
from megatron.tokenizers.train import train_sentencepiece

pytestmark = pytest.mark.timeout(300)

STAGES = """
[[stages]]
name = "grows"
samples = 120
mixture = { code = 0.5, text = 0.5 }
shapes = [
  { length = "5 steps", seq_length = 8, global_batch_size = 4 },
  { length = "40 samples", global_batch_size = 8 },
  { seq_length = 24, global_batch_size = 12 },
]
lr = { warmup = "2 steps", peak = 1e-2, shape = "cosine", final = 1e-3, horizon = "40 steps" }

[[stages]]
name = "ramps"
steps = 10
mixture = { python = 1 }
batch_ramp = { start = 4, increment = 4, over = "32 samples" }
global_batch_size = 12
fim = { python = 1.0 }
"""


def make_shaped_run(folder: Path) -> Path:
    tokenizer = folder / "tokenizer.model"
    if not tokenizer.exists():
        words = [f"def name_{n}(value):\n    return value + {n}\n" for n in range(400)]
        names = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>")
        train_sentencepiece(words, tokenizer, 320, special=names)
        (folder / "data").mkdir()
        model = load_tokenizer(tokenizer)
        for seed, name in enumerate(("python", "prose")):
            rng = np.random.default_rng(seed)
            with IndexedDatasetWriter(folder / "data" / name, np.uint16) as writer:
                for _ in range(150):
                    ids = rng.integers(5, 300, size=int(rng.integers(5, 90)))
                    writer.add_document(np.append(ids, model.eod_id))
                writer.manifest_fields["tokenizer"] = {
                    "name": model.name, "fingerprint": model.fingerprint, "vocab_size": model.vocab_size,
                }  # fmt: skip
    head, tail = tiny_run.CONFIG.split("[[stages]]", 1)[0], tiny_run.CONFIG.split("[checkpoint]", 1)[1]
    text = head.replace('path = "bytes"', f'path = "{tokenizer}"')
    text = text.replace('group = "code"\n', 'group = "code"\nfim = {{ rate = 0.5, spm = 0.5 }}\n')
    return make_run(folder, "run", text + STAGES.replace("{", "{{").replace("}", "}}") + "\n[checkpoint]" + tail)


def test_T2_a_run_that_changes_shape_is_exact_over_a_kill(tmp_path: Path) -> None:
    config = make_shaped_run(tmp_path)
    done = train(config)
    assert done.returncode == 0, done.stderr
    whole = curve_of(tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    batches = [sum(row["samples_by_source"].values()) for row in rows]
    assert batches == [4] * 5 + [8] * 5 + [12] * 5 + [4] * 4 + [8] * 2 + [12] * 4
    lengths = [row["tokens"] // batch for row, batch in zip(rows, batches, strict=True)]
    assert lengths == [8] * 5 + [16] * 5 + [24] * 5 + [16] * 10
    ledger = read_ledger(tmp_path / "run")
    assert ledger.consumed_tokens == sum(row["tokens"] for row in rows) and ledger.consumed_steps == len(rows)
    displaced = [stage.use["python"].displaced for stage in ledger.stages]
    assert 0 < displaced[0] < displaced[1] and displaced[1] % 3 == 0
    assert "prose" not in ledger.stages[0].fim and ledger.stages[1].fim == {"python": ["1", "0.5"]}
    (tmp_path / "run").rename(tmp_path / "undisturbed")
    process = tiny_run.start(config)
    try:
        path, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 60
        while time.monotonic() < end and not (path.exists() and b'"step": 8,' in path.read_bytes()):
            time.sleep(0.01)
    finally:
        tiny_run.stop(process)
    done = train(config)
    assert done.returncode == 0, done.stderr
    assert curve_of(tmp_path / "run") == whole


def test_M5_changed_shapes_and_rates_of_a_begun_stage_are_refused(tmp_path: Path) -> None:
    config = make_shaped_run(tmp_path)
    assert train(config).returncode == 0
    text = config.read_text()
    config.write_text(text.replace('length = "5 steps"', 'length = "6 steps"').replace("rate = 0.5", "rate = 0.6"))
    done = train(config)
    assert done.returncode == 5
    assert "stage 'grows': its batch x sequence length was 4 x 8, from sample 20: 8 x 16" in done.stderr
    assert "fill-in-the-middle rates was {'python': ['0.5', '0.5']} and is now {'python': ['0.6'" in done.stderr


def test_B1_a_rate_without_sentinels_is_refused(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    done = train(config, "--set", "stages.balanced.fim.python=0.5")
    assert done.returncode == 2 and "has no sentinels for it" in done.stderr
    done = train(config, "--set", 'tokenizer.fim=["<a>","<b>","<c>"]')
    assert done.returncode == 2 and "tokenizer.fim: '<a>' is no special token of bytes" in done.stderr


def test_the_witness_names_rearranged_pieces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron.commands.inspect_data import main

    assert main([str(make_shaped_run(tmp_path)), "--samples", "120:140", "--jsonl"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row in rows:
        lengths = [end - start for _, start, end in row["pieces"]]
        assert sum(lengths) == 16
        assert row.get("fim", []) == [number for number, length in enumerate(lengths) if length >= 8]
