"""The one door to lm-evaluation-harness: `simple_evaluate` over local or named tasks, on a folder, offline by default.

With `offline`, neither the harness nor the libraries below it ask the network for anything: settings are given to them
in Python, environment variables play no part.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.config.errors import ConfigError, DataError, UnavailableError

# The accuracy of a task that is shown first and compared: the first of these that the task has.
ACCURACIES = ("acc_mutual_info", "acc")


@dataclass(frozen=True)
class HarnessSettings:
    """How to run. `limit`: at most so many items of a task, for trials. `device`: "cpu", "cuda", "cuda:1"."""

    batch_size: int = 64
    dtype: str = "auto"
    device: str = "cpu"
    limit: int | None = None
    offline: bool = True
    seed: int = 1234


def require_harness() -> Any:
    """The module lm_eval. Raises UnavailableError where it is not installed."""
    try:
        module = importlib.import_module("lm_eval")
        importlib.import_module("lm_eval.models.huggingface")
    except ImportError as error:
        raise UnavailableError(
            f"lm-evaluation-harness is not usable here ({error}): pip install 'stagemix[eval]' (lm_eval with its hf "
            "extra), then run evaluate again"
        ) from None
    return module


def run_tasks(
    folder: Path, tasks: Sequence[str], include_path: Path | None, settings: HarnessSettings
) -> dict[str, dict[str, Any]]:
    """Results by task: {"metrics": {name: {"value", "stderr"}}, "items", "correct"} of the model in `folder`.

    `correct` is a string of 0 and 1, item by item, for the first of ACCURACIES that a task has: what paired
    comparisons need. Standard errors are the harness' own; for bits a byte, where it gives none, of the ratio
    estimator over documents.
    Raises ConfigError for an unknown task, DataError where a data set cannot be had.
    """
    lm_eval = require_harness()
    _quiet()
    if settings.offline:
        _no_network()
    manager = importlib.import_module("lm_eval.tasks").TaskManager(
        include_path=str(include_path.resolve()) if include_path else None,
        include_defaults=not _all_local(tasks, include_path),
    )
    _check_known(tasks, manager)
    model = _load(folder, settings)
    try:
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=list(tasks),
            task_manager=manager,
            batch_size=settings.batch_size,
            limit=settings.limit,
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
            log_samples=True,
        )
    except AssertionError:
        # The harness says no more: it asserts that context and answer are not empty and that the answer fits.
        raise DataError(
            f"{folder}: an item of {', '.join(tasks)} is empty, or its answer has more tokens than the model's "
            f"{model.max_length} positions: choose tasks with shorter answers, or a model with more positions"
        ) from None
    except (OSError, ConnectionError) as error:
        raise DataError(
            f"tasks {', '.join(tasks)}: their data cannot be had ({error}). With network, say --online to let the "
            "harness fetch it; without, point --include-path to task files with local data"
        ) from None
    return {name: _one(name, results) for name in results["results"]}


def harness_version() -> str:
    """The installed version, for the record."""
    return importlib.import_module("importlib.metadata").version("lm_eval")  # type: ignore[no-any-return]


def _load(folder: Path, settings: HarnessSettings) -> Any:
    hflm = importlib.import_module("lm_eval.models.huggingface").HFLM
    try:
        # An absolute path is never mistaken for the name of a repository on the hub.
        return hflm(
            pretrained=str(folder.resolve()),
            dtype=settings.dtype,
            device=settings.device,
            batch_size=settings.batch_size,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: not a model folder that transformers can load: {error}") from None


def _all_local(tasks: Sequence[str], include_path: Path | None) -> bool:
    """Whether every task has its own file in `include_path`; then the harness' thousands need not be indexed."""
    return include_path is not None and all((include_path / f"{task}.yaml").is_file() for task in tasks)


def _check_known(tasks: Sequence[str], manager: Any) -> None:
    known = set(manager.all_tasks)
    for task in tasks:
        if task not in known:
            near = importlib.import_module("difflib").get_close_matches(task, known, n=3)
            hint = f" Did you mean {', '.join(near)}?" if near else " Is --include-path right?"
            raise ConfigError(f"task {task!r} is not known to lm-evaluation-harness.{hint}")


def _one(name: str, results: Mapping[str, Any]) -> dict[str, Any]:
    raw: Mapping[str, Any] = results["results"][name]
    samples: Sequence[Mapping[str, Any]] = results.get("samples", {}).get(name, ())
    metrics: dict[str, dict[str, float | None]] = {}
    for key, value in raw.items():
        metric, _, _filter = key.partition(",")
        if not isinstance(value, int | float) or metric in ("alias", "name") or "_stderr" in metric or "," not in key:
            continue
        error = raw.get(key.replace(metric, f"{metric}_stderr", 1))
        metrics[metric] = {"value": float(value), "stderr": float(error) if isinstance(error, int | float) else None}
    if (loss := metrics.get("bits_per_byte")) and loss["stderr"] is None:
        nats = ratio_stderr([sample["bits_per_byte"] for sample in samples])
        loss["stderr"] = None if nats is None else nats / math.log(2)
    one: dict[str, Any] = {"metrics": metrics, "items": len(samples)}
    accuracy = next((metric for metric in ACCURACIES if samples and metric in samples[0]), None)
    if accuracy is not None:
        one["correct"] = "".join("1" if sample[accuracy] else "0" for sample in samples)
    return one


def ratio_stderr(pairs: Sequence[Sequence[float]]) -> float | None:
    """Standard error of sum(a) / sum(b) over pairs (a, b), by linearisation (Cochran, Sampling Techniques, 6.4)."""
    count = len(pairs)
    below = sum(b for _, b in pairs)
    if count < 2 or below <= 0:
        return None
    ratio = sum(a for a, _ in pairs) / below
    squares = sum((a - ratio * b) ** 2 for a, b in pairs)
    return math.sqrt(count / (count - 1) * squares) / below


def _quiet() -> None:
    # The harness records the git commit of the user's working directory, and git complains where there is none.
    importlib.import_module("lm_eval.evaluator").get_git_commit_hash = lambda: None
    for name in ("lm_eval", "lm-eval", "transformers", "datasets", "accelerate", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _no_network() -> None:
    """Tells the libraries below not to ask the network: they would count downloads, or look for newer files."""
    datasets = importlib.import_module("datasets")
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.config.HF_HUB_OFFLINE = True
    datasets.config.HF_DATASETS_OFFLINE = True
    datasets.disable_progress_bars()
    hub: Any = importlib.import_module("huggingface_hub.constants")
    hub.HF_HUB_OFFLINE = True
