"""Megatron-LM's side of the data benchmark: one measurement in a process of its own, with its tree first on the path.

    python benchmarks/data_peer.py TREE WHAT '{"argument": …}'        # prints `RESULT {…}`
    python benchmarks/data_peer.py TREE tool tools/preprocess_data.py -- ARGUMENTS

Nothing of its algorithms is touched. Under Python 3.11 `typing.override`, which its sources import, is taken from
typing_extensions. Its own log goes where it sends it. Imports nothing of this project.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
import typing
import warnings
from pathlib import Path
from typing import Any

BENCHMARKS = str(Path(__file__).resolve().parent)


def memory_mb(field: str) -> float:
    """A field of /proc/self/status such as VmHWM or RssAnon, in MB (1e6)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    return float("nan")


def reset_peak() -> float:
    """Begins a new peak of resident memory; returns what is resident now, in MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory_mb("VmRSS")


def dataset(prefixes: list[str], weights: list[float] | None, samples: int, cache: str, **options: Any) -> Any:
    """The training set as pretrain_gpt.py builds it: BlendedMegatronDatasetBuilder over GPTDataset.

    Every option that is not named has the default of Megatron-LM's command line.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.tokenizers import MegatronTokenizer

    tokenizer = MegatronTokenizer.from_pretrained(metadata_path={"library": "null-text"}, vocab_size=32_000)
    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=options.pop("sequence_length", 2048),
        blend=(prefixes, weights),
        split="1,0,0",
        path_to_cache=cache,
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        **options,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()[0]


def index(a: dict[str, Any]) -> dict[str, Any]:
    """Builds and saves document, sample and shuffle index of one source; the file's opening is counted."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    samples = (a["epochs"] * a["tokens"] - 1) // a["seq_length"]
    dataset([a["warm"]], None, 10, a["cache"] + "-warm")  # imports and caches of the libraries, not counted
    resident = reset_peak()
    began = time.perf_counter()
    built = dataset([a["prefix"]], None, samples, a["cache"])
    seconds = time.perf_counter() - began
    peak = memory_mb("VmHWM")
    size = sum(path.stat().st_size for path in Path(a["cache"]).iterdir())
    began = time.perf_counter()
    IndexedDataset(a["prefix"], multimodal=False, mmap=True)
    opened = time.perf_counter() - began
    return {
        "seconds": seconds,
        "open_seconds": opened,
        "bytes": size,
        "samples": len(built),
        "memory_mb": peak - resident,
    }


def second_arm(a: dict[str, Any]) -> dict[str, Any]:
    """Builds one blend and then another with other weights and horizon; what the second one built."""
    cache = Path(a["cache"])
    began = time.perf_counter()
    dataset(a["prefixes"], a["first"]["weights"], a["first"]["samples"], str(cache))
    first = time.perf_counter() - began
    before = {path.name for path in cache.iterdir()}
    began = time.perf_counter()
    dataset(a["prefixes"], a["second"]["weights"], a["second"]["samples"], str(cache))
    seconds = time.perf_counter() - began
    added = [path for path in cache.iterdir() if path.name not in before]
    size = sum(path.stat().st_size for path in added)
    return {"first_seconds": first, "seconds": seconds, "files_added": len(added), "bytes_added": size}


def blend(a: dict[str, Any]) -> dict[str, Any]:
    """`build_blending_indices` as BlendedDataset calls it, and the arrays that it fills."""
    import numpy

    from megatron.core.datasets import helpers

    samples, weights = a["samples"], a["weights"]
    resident = reset_peak()
    began = time.perf_counter()
    sources = numpy.zeros(samples, dtype=numpy.int16)
    numbers = numpy.zeros(samples, dtype=numpy.int64)
    helpers.build_blending_indices(sources, numbers, weights, len(weights), samples, False)
    seconds = time.perf_counter() - began
    memory = memory_mb("VmHWM") - resident
    counts = numpy.bincount(sources, minlength=len(weights))
    error = float(numpy.max(numpy.abs(counts - samples * numpy.array(weights) / sum(weights))))
    return {"seconds": seconds, "memory_mb": memory, "largest_error": error}


def resume(a: dict[str, Any]) -> dict[str, Any]:
    """Maps a blend's two arrays as BlendedDataset does on a cache hit, and reads the entries of a few steps."""
    from megatron.core.safe_globals import safe_numpy_load

    resident = reset_peak()
    began = time.perf_counter()
    sources = safe_numpy_load(a["sources"], allow_pickle=True, mmap_mode="r")
    numbers = safe_numpy_load(a["numbers"], allow_pickle=True, mmap_mode="r")
    at, batch = a["at"], a["batch"]
    first = [(int(sources[n]), int(numbers[n])) for n in range(at - batch, at)]
    seconds = time.perf_counter() - began
    size = Path(a["sources"]).stat().st_size + Path(a["numbers"]).stat().st_size
    return {"seconds": seconds, "gigabytes": size / 1e9, "memory_mb": memory_mb("VmHWM") - resident, "read": len(first)}


def read(a: dict[str, Any]) -> dict[str, Any]:
    """Seconds a sample of 2048 tokens, sample after sample, in the ways that a run may ask for."""
    import torch
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    count, rounds = a["count"], a["rounds"]
    one, two = [a["prefixes"][0]], a["prefixes"]
    half = [0.5, 0.5]
    ways = {
        "single, no mask": dataset(one, None, count, a["cache"], create_attention_mask=False),
        "blended, no mask": dataset(two, half, count, a["cache"], create_attention_mask=False),
        "blended, cu_seqlens": dataset(two, half, count, a["cache"], inter_document_masking=True),
        "blended, default mask": dataset(two, half, count, a["cache"]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*ways, "blended, default mask, DataLoader")}
    for number in range(rounds + 1):
        for name, data in ways.items():
            began = time.perf_counter()
            for place in range(count):
                data[place]
            if number:
                seconds[name].append((time.perf_counter() - began) / count)
        began = time.perf_counter()
        for _ in DataLoader(ways["blended, default mask"], batch_size=8):
            pass
        if number:
            seconds["blended, default mask, DataLoader"].append((time.perf_counter() - began) / count)
    return {"seconds": {name: sorted(values)[len(values) // 2] for name, values in seconds.items()}}


def phases(a: dict[str, Any]) -> dict[str, Any]:
    """What each phase of `--phase-transition-iterations` trains on: for each sample its source and its tokens' ids.

    The steps of pretrain() at commit d98e8a64, with its own functions, a process for each phase as it restarts:
    - the command line goes through its parser and validation; megatron/training/arguments.py:688 sorts the iterations;
    - `args.iteration` comes from the checkpoint that megatron/training/training.py:4132-4150 saved at the boundary
      before it left; `update_train_iters` is called at training.py:2575;
    - training.py:5445-5450 asks for the samples of the current phase alone, training.py:5495-5497 counts consumed
      samples from the phase's beginning; random_seed is --seed in both (pretrain_gpt.py:405);
    - build_pretraining_data_loader gives sampler and loader. Only the flags that it keeps on a GPU are left out.
    """
    import pretrain_gpt
    import torch.distributed

    from megatron.core import parallel_state
    from megatron.training import arguments, training
    from megatron.training.global_vars import set_args

    sys.argv = ["pretrain_gpt.py", *a["flags"]]
    args = arguments.parse_args()
    arguments.validate_args(args)
    set_args(args)
    training.update_train_iters(args)
    args.iteration = a["iteration"]
    train, _, _ = training.build_train_valid_test_datasets(pretrain_gpt.train_valid_test_datasets_provider)
    last = max(n for n in (0, *args.phase_transition_iterations) if n <= args.iteration)
    consumed = (args.iteration - last) * args.global_batch_size
    torch.distributed.init_process_group("gloo", init_method=f"file://{a['rendezvous']}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    samples: list[list[Any]] = []
    for batch in training.build_pretraining_data_loader(train, consumed):
        samples += [[int(n), ids.tolist()] for n, ids in zip(batch["dataset_id"], batch["tokens"], strict=True)]
        if len(samples) >= a["samples"]:
            break
    Path(a["output"]).write_text(json.dumps(samples[: a["samples"]]))
    return {"samples": len(samples), "consumed": consumed}


def main() -> None:
    """Runs one measurement."""
    warnings.simplefilter("ignore")
    tree, what, *rest = sys.argv[1:]
    if not hasattr(typing, "override"):
        import typing_extensions

        typing.override = typing_extensions.override  # type: ignore[attr-defined]
    sys.path[:] = [tree, *(entry for entry in sys.path if entry not in ("", BENCHMARKS, tree))]
    if what == "tool":
        sys.argv = [str(Path(tree, rest[0])), *rest[2:]]
        runpy.run_path(sys.argv[0], run_name="__main__")
        return
    import megatron.core

    if Path(tree).resolve() not in Path(megatron.core.__file__).resolve().parents:
        raise SystemExit(f"error: megatron.core is {megatron.core.__file__}, not of {tree}")
    ways = {"index": index, "second_arm": second_arm, "blend": blend, "resume": resume, "read": read, "phases": phases}
    print("RESULT", json.dumps(ways[what](json.loads(rest[0]))), flush=True)


if __name__ == "__main__":
    main()
