"""Task files of others are read before the harness reads them: what would run code of theirs is refused.

The harness lets a task file name Python functions (`!function`), classes, metrics that are scripts, and data sets that
are scripts. A folder of task files that came from elsewhere is then a program. Unless the user says that it is to be
trusted, such a file is refused with its line. Templates are no concern of this module: the harness' template engine is
swapped for one that reaches no attributes of Python's own (harness.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron.config.errors import ConfigError

_REFUSED_KEYS = {
    "class": "it names a Python class",
    "custom_dataset": "it names a Python function",
    "use_prompt": "it takes prompts from another library or file",
}


def check_task_files(folder: Path, trusted_root: Path, metrics: Collection[str]) -> None:
    """Raises ConfigError for the first task file in `folder`, or included by one, that would run code.

    trusted_root: the harness' own task files, which may be included. metrics: names that the harness itself computes.
    """
    seen: set[Path] = set()
    waiting = sorted(folder.resolve().glob("**/*.yaml"))
    while waiting:
        path = waiting.pop(0)
        if path in seen or path.is_relative_to(trusted_root.resolve()):
            continue
        seen.add(path)
        content = _read(path)
        _check_keys(path, content)
        for metric, entry in _metrics(content):
            if metric not in metrics or entry.get("hf_evaluate"):
                raise _refusal(path, f"metric {metric!r} is none of the harness' own, so it would be run as a script")
        includes = content.get("include", [])
        for name in includes if isinstance(includes, list) else [includes]:
            waiting.append((path.parent / str(name)).resolve())


def _read(path: Path) -> Mapping[str, Any]:
    """The file as data. Any explicit tag, such as `!function`, is refused where it stands."""
    yaml = importlib.import_module("yaml")
    try:
        text = path.read_text(encoding="utf-8")
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            tag = getattr(event, "tag", None)
            if (
                tag is not None
                and not tag.startswith("tag:yaml.org,2002:")
                or (tag or "").startswith("tag:yaml.org,2002:python")
            ):
                line = event.start_mark.line + 1
                raise _refusal(path, f"line {line}: {tag} would run Python code")
        content = yaml.safe_load(text)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such task file, and another includes it") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not a task file: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: not a task file: {type(content).__name__}, and keys with values are needed")
    return content


def _check_keys(path: Path, content: Mapping[str, Any]) -> None:
    for key, why in _REFUSED_KEYS.items():
        if content.get(key):
            raise _refusal(path, f"{key}: {why}")
    if str(content.get("dataset_path", "")).endswith(".py"):
        raise _refusal(path, "dataset_path names a Python script")
    if (content.get("dataset_kwargs") or {}).get("trust_remote_code"):
        raise _refusal(path, "dataset_kwargs.trust_remote_code lets a data set run code")
    if content.get("unsafe_code"):
        raise _refusal(path, "unsafe_code: its metric executes programs of the model without walls")


def _metrics(content: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for entry in content.get("metric_list") or []:
        if isinstance(entry, dict) and "metric" in entry:
            yield str(entry["metric"]), entry


def _refusal(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{path}: {why}. Task files are data and are not trusted with code: read the file, and say --trust-task-code "
        "if you want it to run"
    )
