"""The one door to lm-evaluation-harness: its tasks and its model class, on a folder, offline by default.

With `offline`, neither the harness nor the libraries below it ask the network for anything: settings are given to them
in Python, environment variables play no part. Task files of the user are data: what would run code of theirs is
refused, and templates are rendered where they reach nothing but the item.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.config.errors import ConfigError, DataError, UnavailableError
from megatron.evaluation.harness_results import ratio_stderr, task_result
from megatron.evaluation.task_file_checks import check_task_files

__all__ = ["HarnessModel", "HarnessSettings", "Sampling", "load_model", "ratio_stderr", "require_harness", "run_tasks"]

TaskResults = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class HarnessSettings:
    """How to run. `limit`: at most so many items of a task, for trials. `device`: "cpu", "cuda", "cuda:1".

    `trust_task_code`: task files of the user may name Python code, and it is run.
    """

    batch_size: int = 64
    dtype: str = "auto"
    device: str = "cpu"
    limit: int | None = None
    offline: bool = True
    seed: int = 1234
    trust_task_code: bool = False


@dataclass(frozen=True)
class Sampling:
    """How texts are continued: greedily at temperature 0, else by nucleus sampling, until one of `until` appears."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    until: tuple[str, ...] = ()
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


class HarnessModel:
    """A model folder behind the harness' own HFLM, loaded once for any number of tasks.

    It remembers of each scored (context, continuation) how many tokens the continuation had, and whether the context
    was cut on the left.
    """

    def __init__(self, inner: Any, folder: Path, settings: HarnessSettings) -> None:
        self.inner = inner
        self.folder = folder
        self.settings = settings
        self._tokens: dict[tuple[str, str], int] = {}
        self._cut: set[tuple[str, str]] = set()
        scored = inner._loglikelihood_tokens

        def remember(requests: Sequence[Any], *arguments: Any, **named: Any) -> Any:
            for texts, context, continuation in requests:
                if texts and isinstance(texts, tuple) and len(texts) == 2:
                    self._tokens[texts] = len(continuation)
                    if len(context) + len(continuation) > inner.max_length + 1:
                        self._cut.add(texts)
            return scored(requests, *arguments, **named)

        inner._loglikelihood_tokens = remember

    @property
    def positions(self) -> int:
        """The most tokens that the model takes."""
        return int(self.inner.max_length)

    def tokens(self, context: str, continuation: str) -> int | None:
        """How many tokens of this continuation were scored behind this context, if any were."""
        return self._tokens.get((context, continuation))

    def was_cut(self, context: str, continuation: str) -> bool:
        """Whether this context was cut on the left."""
        return (context, continuation) in self._cut

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """log P(continuation | context) in nats of each pair; an empty context is the beginning of a text."""
        try:
            return [float(one[0]) for one in self.inner.loglikelihood(self._requests("loglikelihood", pairs), True)]
        except AssertionError:
            raise DataError(
                f"{self.folder}: a text is empty, or has more tokens than the model's {self.positions} positions"
            ) from None

    def longest_prompt(self, prompts: Sequence[str]) -> tuple[int, str]:
        """(tokens, prompt) of the longest, (0, "") of none. Raises DataError for an empty one."""
        if "" in prompts:
            raise DataError("a prompt is empty")
        lengths = ((len(self.inner.tok_encode(prompt)), prompt) for prompt in dict.fromkeys(prompts))
        return max(lengths, key=lambda pair: pair[0], default=(0, ""))

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> list[str]:
        """A continuation of each prompt; the same for the same seed, prompts, batch size and machine.

        Raises DataError for prompts that leave no room for sampling.max_new_tokens: none is cut.
        """
        length, longest = self.longest_prompt(prompts)
        if length + sampling.max_new_tokens > self.positions:
            most = self.positions - length
            lower = f"lower --max-new-tokens to at most {most}, or take" if most > 0 else "shorten the prompt, or take"
            raise DataError(
                f"{self.folder}: a prompt of {length} tokens and {sampling.max_new_tokens} new ones do not fit into "
                f"the model's {self.positions} positions: {lower} a model with more. It begins: {longest[:60]!r}"
            )
        how: dict[str, Any] = {
            "until": list(sampling.until),
            "max_gen_toks": sampling.max_new_tokens,
            "do_sample": sampling.temperature > 0,
            "temperature": sampling.temperature,
        }
        if sampling.temperature > 0:
            how |= {"top_p": sampling.top_p, "top_k": 0}  # transformers' own default would be the 50 likeliest
        torch.manual_seed(sampling.seed)
        requests = self._requests("generate_until", [(prompt, how) for prompt in prompts])
        return [str(one) for one in self.inner.generate_until(requests, disable_tqdm=True)]

    @staticmethod
    def _requests(kind: str, arguments: Iterable[tuple[Any, ...]]) -> list[Any]:
        instance = importlib.import_module("lm_eval.api.instance").Instance
        return [instance(request_type=kind, doc={}, arguments=one, idx=0) for one in arguments]


def load_model(folder: Path, settings: HarnessSettings) -> HarnessModel:
    """The model of a Hugging Face folder. Raises DataError for anything else, UnavailableError without the harness."""
    require_harness()
    _quiet()
    if settings.offline:
        _no_network()
    hflm = importlib.import_module("lm_eval.models.huggingface").HFLM
    try:
        # An absolute path is never mistaken for the name of a repository on the hub.
        inner = hflm(
            pretrained=str(folder.resolve()),
            dtype=settings.dtype,
            device=settings.device,
            batch_size=settings.batch_size,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: not a model folder that transformers can load: {error}") from None
    return HarnessModel(inner, folder, settings)


def run_tasks(
    model: Path | HarnessModel, tasks: Sequence[str], include_path: Path | None, settings: HarnessSettings
) -> TaskResults:
    """Results by task, as harness_results.task_result gives them, of a model or of the model in a folder.

    Raises ConfigError for an unknown task and for task files that would run code, DataError where a data set cannot be
    had or an item cannot be asked.
    """
    lm_eval = require_harness()
    _quiet()
    if settings.offline:
        _no_network()
    if include_path is not None and not settings.trust_task_code:
        check_task_files(include_path, _own_folder(), _own_metrics())
    manager = importlib.import_module("lm_eval.tasks").TaskManager(
        include_path=str(include_path.resolve()) if include_path else None,
        include_defaults=not _all_local(tasks, include_path),
    )
    _check_known(tasks, manager)
    loaded = model if isinstance(model, HarnessModel) else load_model(model, settings)
    opened = _open_tasks(tasks, manager)
    try:
        results = lm_eval.simple_evaluate(
            model=loaded.inner,
            tasks=opened,
            task_manager=manager,
            batch_size=settings.batch_size,
            limit=settings.limit,
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
            log_samples=True,
        )
    except AssertionError as error:
        # Mostly the harness says no more: it asserts that context and answer are not empty and that the answer fits.
        raise DataError(
            f"{loaded.folder}: an item of {', '.join(tasks)} is empty, or its answer has more tokens than the model's "
            f"{loaded.positions} positions: choose tasks with shorter answers, or a model with more positions"
            + (f" ({error})" if str(error) else "")
        ) from None
    samples: Mapping[str, Any] = results.get("samples", {})
    return {
        name: task_result(raw, samples.get(name, ()), loaded.tokens, loaded.was_cut)
        for name, raw in results["results"].items()
    }


def harness_version() -> str:
    """The installed version, for the record."""
    return importlib.import_module("importlib.metadata").version("lm_eval")  # type: ignore[no-any-return]


def own_task_files(names: Iterable[str]) -> dict[str, Path]:
    """The harness' own task file of each name. Raises UnavailableError for names that this version does not have."""
    wanted = set(names)
    found: dict[str, Path] = {}
    pattern = re.compile(rb"^task:[ ]*(" + b"|".join(re.escape(name).encode() for name in wanted) + rb")[ ]*\r?$", re.M)
    for path in sorted(_own_folder().rglob("*.yaml")) if wanted else ():
        if match := pattern.search(path.read_bytes()):
            found.setdefault(match[1].decode(), path)
    if gone := sorted(wanted - set(found)):
        raise UnavailableError(
            f"lm_eval {harness_version()} has no task {', '.join(gone)}: install the version that requirements/ names"
        )
    return found


def unavailable_tasks(tasks: Iterable[str], include_path: Path) -> dict[str, str]:
    """Of the tasks in `include_path`, those whose data cannot be had, and why. Fetches what can be had."""
    require_harness()
    _quiet()
    manager = importlib.import_module("lm_eval.tasks").TaskManager(
        include_path=str(include_path.resolve()), include_defaults=False
    )
    lost: dict[str, str] = {}
    for task in tasks:
        try:
            _open_tasks([task], manager)
        except DataError as error:
            lost[task] = str(error).partition(". With network")[0]
    return lost


def fetch_rows(path: str, name: str | None, split: str, columns: Sequence[str] | None) -> list[dict[str, Any]]:
    """Rows of a data set of the Hugging Face hub, over the network. Raises DataError where it cannot be had."""
    require_harness()
    _quiet()
    datasets = importlib.import_module("datasets")
    try:
        found = datasets.load_dataset(path, name, split=split)
        found = found.select_columns(list(columns)) if columns else found
        return [dict(row) for row in found]
    except (OSError, ConnectionError, ValueError) as error:
        raise DataError(f"data set {path} cannot be fetched: {error}. Put its file into --data DIR") from None


def _open_tasks(tasks: Sequence[str], manager: Any) -> list[Any]:
    """The tasks with their data, and with `max_new_tokens` of their metadata in force."""
    try:
        loaded = manager.load(list(tasks))
    except (OSError, ConnectionError) as error:
        raise DataError(
            f"tasks {', '.join(tasks)}: their data cannot be had ({error}). With network, say --online to let the "
            "harness fetch it; without, point --include-path to task files with local data"
        ) from None
    except Exception as error:  # a data set or a template that is wrong may raise anything of four libraries
        raise DataError(
            f"tasks {', '.join(tasks)}: the harness cannot use their data or their templates: "
            f"{type(error).__name__}: {error}. Is a data file empty, or does it lack a field?"
        ) from None
    for task in loaded["tasks"].values():
        most = (getattr(task.config, "metadata", None) or {}).get("max_new_tokens")
        if most and task.config.generation_kwargs is not None:
            task.config.generation_kwargs["max_gen_toks"] = int(most)
    groups: Mapping[str, Any] = loaded.get("groups", {})
    inside = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    alone = [task for name, task in loaded["tasks"].items() if name not in inside]
    return [*alone, *(groups[name] for name in tasks if name in groups)]


def _own_folder() -> Path:
    return Path(str(importlib.import_module("lm_eval").__file__)).parent / "tasks"


def _own_metrics() -> set[str]:
    importlib.import_module("lm_eval.api.metrics")
    return set(importlib.import_module("lm_eval.api.registry").metric_registry.keys())


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


def _quiet() -> None:
    # The harness records the git commit of the user's working directory, and git complains where there is none; and
    # what pip has installed, for which it starts pip and waits for seconds. Neither is kept here.
    evaluator: Any = importlib.import_module("lm_eval.evaluator")
    evaluator.get_git_commit_hash = lambda: None
    evaluator.add_env_info = lambda results: None
    for name in ("lm_eval", "lm-eval", "transformers", "datasets", "accelerate", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    _tame_templates()


def _tame_templates() -> None:
    """Templates of task files are rendered in Jinja's sandbox: plain Jinja lets one reach every module of Python."""
    words: Any = importlib.import_module("lm_eval.utils")
    sandbox = importlib.import_module("jinja2.sandbox").ImmutableSandboxedEnvironment
    if isinstance(words.env, sandbox):
        return
    tamed = sandbox(loader=words.env.loader, undefined=words.env.undefined, keep_trailing_newline=True)
    tamed.filters.update(words.env.filters)
    words.env = tamed


def _no_network() -> None:
    """Tells the libraries below not to ask the network: they would count downloads, or look for newer files."""
    datasets = importlib.import_module("datasets")
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.config.HF_HUB_OFFLINE = True
    datasets.config.HF_DATASETS_OFFLINE = True
    datasets.disable_progress_bars()
    hub: Any = importlib.import_module("huggingface_hub.constants")
    hub.HF_HUB_OFFLINE = True
