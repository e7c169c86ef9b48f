"""Part d's rows "from the loader": the trainer put together as `stagemix train` does it, less the checkpoints.

A corpus of random letters is indexed, mixed from two sources, read by the loader's threads and trained on by the loop
with its hooks and metrics. The last step of a run is always saved, 12 bytes a parameter, which would take longer than
all steps: that hook alone is taken away. Weights come from the run's seed, as in a run.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from typing import TYPE_CHECKING, Any

from gpu_corpus import write_random
from gpu_job import Context

from megatron.config.schema import KernelsSection, RunConfig
from megatron.engines.kernel_obstacles import interpreted_obstacle
from megatron.trainer.build import build
from megatron.trainer.hooks import Checkpoint
from megatron.trainer.loop import train
from megatron.trainer.pace import Pace
from megatron.trainer.resume import Start
from megatron.trainer.run_folder import RunFolder
from megatron.trainer.session import Mute
from megatron.trainer.signals import StopSignals
from megatron.trainer.state import TrainerState
from megatron.trainer.stopping import Stopping

if TYPE_CHECKING:
    from gpu_training import Setting

_STEPS, _UNCOUNTED = 12, 4
"""Of which the first compile, or wait for the loader's first batches."""


def train_through_loader(context: Context, setting: Setting) -> dict[str, Any]:
    """As `gpu_training` measures a case, by the seconds that the trainer records."""
    steps, uncounted = (3, 1) if context.dry else (_STEPS, _UNCOUNTED)
    output = context.work / "loader-run"
    shutil.rmtree(output, ignore_errors=True)
    prefixes = [context.work / "loader" / f"source-{number}-{setting.tokens}" for number in range(2)]
    for number, prefix in enumerate(prefixes):
        if not prefix.with_suffix(".idx").exists():
            write_random(prefix, steps * setting.tokens + setting.seq_length, number)
    config = RunConfig.model_validate(_tables(setting, steps, str(output), [str(prefix) for prefix in prefixes]))
    begin = time.perf_counter()
    folder, state = RunFolder(output), TrainerState()
    folder.open()
    try:
        built = build(
            config,
            Start(False, None),
            False,
            folder,
            state,
            Mute(1, terminal=False),
            Stopping(StopSignals(lambda number: None), Pace()),
        )
        assert built is not None
        built.run.hooks = [hook for hook in built.run.hooks if not isinstance(hook, Checkpoint)]
        ready = time.perf_counter() - begin
        try:
            train(built.run)
        finally:
            built.close()
        words = built.run.engine.describe()["kernels"]
    finally:
        folder.close()
    rows = [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == steps and not any(row["skipped"] for row in rows), rows
    counted = rows[uncounted:]
    waited = sum(row["data_seconds"] for row in counted) / sum(row["step_seconds"] for row in counted)
    return {
        "seconds": statistics.median(row["step_seconds"] for row in counted),
        "steps": len(counted),
        "ready": ready,
        "loss": rows[-1]["loss"],
        "words": f"{words}; {waited:.2%} of the time spent waiting for data",
    }


def _tables(setting: Setting, steps: int, output: str, prefixes: list[str]) -> dict[str, Any]:
    """The config of the run."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    names += ("intermediate_size", "rope_theta", "tie_word_embeddings")
    asked = {key: value for key, value in setting.kernels.items() if key in KernelsSection.model_fields}
    # In a dry run Triton is interpreted, which a compiled layer cannot do.
    compiled = setting.kernels["compile_layers"] and not interpreted_obstacle(setting.kernels)
    rows = setting.fit.micro_batch
    return {
        "run": {"name": "gpu-benchmark", "output": output, "seed": 1},
        "tokenizer": {"path": "bytes"},
        "model": {"seq_length": setting.seq_length, **{name: getattr(setting.shape, name) for name in names}},
        "sources": {
            name: {"group": name, "data": [prefix]} for name, prefix in zip(("code", "text"), prefixes, strict=True)
        },
        "data": {"cache": f"{output}-cache", "workers": 2},
        "validation": {"fraction": 0},
        "train": {
            "global_batch_size": rows * setting.micro_batches,
            "micro_batch_size": rows,
            "precision": "bf16",
            "gradients": setting.gradients,
        },
        "optimizer": setting.case.optimizer_section.model_dump(),
        "parallel": setting.parallel,
        "kernels": {**asked, "compile": "layers" if compiled else "none"},
        "stages": [{"name": "only", "steps": steps, "mixture": {"code": "0.5", "text": "0.5"}, "lr": {"peak": 1e-4}}],
        "checkpoint": {"every": 10**9},
    }
