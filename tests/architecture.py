"""The checker of the house rules: functions from a root folder to complaints, one line each, `FILE:LINE: what`.

It reads sources with `ast` and imports none of them, so that tests can plant violations in a temporary tree. An import
counts wherever it stands: at the top, inside a function, under TYPE_CHECKING, or as import_module("a.literal.name").
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

# From the top down; a row imports only from rows below it, never sideways, freely inside one package.
ROWS: tuple[tuple[str, ...], ...] = (
    ("commands",),
    ("study",),
    ("trainer",),
    ("hf", "evaluation", "foreign", "generation"),
    ("planner", "launch"),
    ("engines",),
    ("models",),
    ("parallel",),
    ("checkpoint", "optim"),
    ("preprocessing",),
    ("data",),
    ("corpora",),
    ("kernels",),
    ("tokenizers", "metrics"),
    ("config",),
)
ROW = {package: number for number, row in enumerate(ROWS) for package in row}

DOORS = {
    "transformers": "megatron/hf/transformers_door.py",
    "lm_eval": "megatron/evaluation/harness.py",
    "deepspeed": "megatron/engines/deepspeed_engine.py",
    "triton": "megatron/kernels/*_triton.py",
    "wandb": "megatron/metrics/wandb_sink.py",
    "gigatoken": "megatron/tokenizers/gigatoken_encoder.py",
    "tiktoken": "megatron/tokenizers/tiktoken_tokenizer.py",
    "pyarrow": "megatron/corpora/parquet.py",
    "matplotlib": "megatron/planner/plan_picture.py",
    "rensa": "megatron/corpora/near_duplicates.py",
    "apex": "megatron/optim/apex_adam.py",
    "amp_C": "megatron/optim/apex_adam.py",
}
TORCH_FREE = (
    "megatron/config/*.py",
    "megatron/planner/*.py",
    "megatron/launch/*.py",
    "megatron/study/*.py",
    "megatron/tokenizers/*.py",
    "megatron/corpora/*.py",
    "megatron/data/*.py",
    "megatron/preprocessing/*.py",
    "megatron/optim/lr.py",
    *(
        f"megatron/commands/{name}.py"
        for name in (
            "cli",
            "frame",
            "plan",
            "plan_tables",
            "inspect_data",
            "inspect_loss",
            "ledger",
            "report",
            "requeue",
            "status",
            "status_words",
            "preprocess_data",
            "merge_data",
            "preprocess_progress",
            "train_tokenizer",
            "launch_slurm",
            "launch_slurm_arguments",
            "launch_slurm_data",
            "launch_checks",
            "launch_nodes",
            "launch_places",
            "launch_training",
            "study",
            "study_slurm",
            "study_slurm_scripts",
            "study_slurm_shown",
            "study_tables",
            "study_action",
            "study_run",
            "study_progress",
            "study_verified",
            "study_status",
            "study_add_arm",
            "study_report",
            "study_evaluate",
        )
    ),
)
TORCH_ALLOWED_AMONG = ("megatron/data/loader.py",)
BRINGS_TORCH = {"torch", "transformers", "lm_eval", "deepspeed", "triton", "accelerate", "peft"}
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
INERT_PICKLE, INERT_DOOR = "megatron.foreign.inert_pickle", "megatron/foreign/*.py"
ENVIRONMENT_READERS = ("megatron/parallel/mesh.py", "megatron/launch/*.py")
EMPTY_NAMES = {"util", "utils", "helper", "helpers", "common", "misc"}
FILE_LINES, FUNCTION_LINES, KERNEL_LINES = 400, 60, 120


@dataclass(frozen=True)
class Import:
    """One imported module, by its full dotted name, and the line that imports it."""

    name: str
    line: int


@dataclass(frozen=True)
class Source:
    """One Python file of the tree; `path` is relative to the root, with slashes."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def package(self) -> str | None:
        """The package of the house that it belongs to: "data" for megatron/data/mixture.py."""
        parts = self.path.split("/")
        return parts[1] if parts[0] == "megatron" and len(parts) > 2 else None

    @cached_property
    def imports(self) -> list[Import]:
        return list(_imports(self))


@dataclass(frozen=True)
class Tree:
    """The sources below a root folder."""

    root: Path

    @cached_property
    def sources(self) -> list[Source]:
        folders = ("megatron", "tools", "examples", "benchmarks", "tests")
        paths = sorted(path for folder in folders for path in (self.root / folder).rglob("*.py"))
        return [Source(path.relative_to(self.root).as_posix(), path.read_text(encoding="utf-8")) for path in paths]

    @property
    def house(self) -> list[Source]:
        """What ships: megatron and tools."""
        return [source for source in self.sources if source.path.startswith(("megatron/", "tools/"))]

    @cached_property
    def modules(self) -> dict[str, Source]:
        return {source.module: source for source in self.house}

    def targets(self, source: Source) -> Iterator[tuple[Source, int]]:
        """The files of the house that a file imports, with the line."""
        for item in source.imports:
            if (target := self.modules.get(item.name)) is not None and target is not source:
                yield target, item.line


def _imports(source: Source) -> Iterator[Import]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(source, node)
            yield Import(base, node.lineno)
            # each name may be a module of its own: from megatron.data import schedule
            yield from (Import(f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__") and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield Import(argument.value, node.lineno)


def _absolute(source: Source, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    folder = source.path.removesuffix(".py").split("/")[: -node.level]
    return ".".join([*folder, *([node.module] if node.module else [])])


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def layers(tree: Tree) -> Iterator[str]:
    """A row imports only from rows below, never sideways; tools import commands only; every package has a row."""
    for source in tree.house:
        inside = source.path.startswith("megatron/")
        if inside and source.package not in ROW:
            what = f"package {source.package!r} has no row in the house" if source.package else "a file beside packages"
            yield f"{source.path}:1: {what}"
            continue
        for item in source.imports:
            parts = item.name.split(".")
            if parts[0] == "tools" and inside:
                yield f"{source.path}:{item.line}: imports upward: {item.name}"
            if parts[0] != "megatron" or len(parts) < 2:
                continue
            if not inside:
                if parts[1] != "commands":
                    yield f"{source.path}:{item.line}: a tool imports only megatron.commands, not {item.name}"
            elif parts[1] in ROW and parts[1] != source.package:
                here, there = ROW[str(source.package)], ROW[parts[1]]
                if there <= here:
                    way = "sideways" if there == here else "upward"
                    yield f"{source.path}:{item.line}: imports {way}: {source.package} -> {item.name}"


def cycles(tree: Tree) -> Iterator[str]:
    """No module of the house reaches itself through imports."""
    edges = {source.module: sorted({target.module for target, _ in tree.targets(source)}) for source in tree.house}
    state: dict[str, int] = {}
    for start in sorted(edges):
        stack = [(start, iter(edges[start]))] if start not in state else []
        state.setdefault(start, 1)
        while stack:
            module, rest = stack[-1]
            following = next(rest, None)
            if following is None:
                state[module] = 2
                stack.pop()
            elif following not in state:
                state[following] = 1
                stack.append((following, iter(edges[following])))
            elif state[following] == 1:
                path = [name for name, _ in stack]
                yield f"import cycle: {' -> '.join([*path[path.index(following) :], following])}"


def doors(tree: Tree) -> Iterator[str]:
    """Each large optional library is imported in its one door file."""
    for source in tree.sources:
        if source.path.startswith(("tests/", "benchmarks/")):
            continue
        for item in source.imports:
            door = DOORS.get(item.name.split(".")[0])
            if door and not fnmatch(source.path, door):
                yield f"{source.path}:{item.line}: {item.name} is imported only in {door}"


def torch_free_sources(tree: Tree) -> list[Source]:
    """The files from which nothing may lead to torch."""
    free = [source for source in tree.house if any(fnmatch(source.path, pattern) for pattern in TORCH_FREE)]
    return [source for source in free if source.path not in TORCH_ALLOWED_AMONG]


def torch_free(tree: Tree) -> Iterator[str]:
    """No chain of imports, lazy ones included, leads from a torch-free file to torch."""
    for source in torch_free_sources(tree):
        queue, seen = [(source, [source.path])], {source.path}
        while queue:
            here, path = queue.pop()
            for item in here.imports:
                if item.name.split(".")[0] in BRINGS_TORCH or item.name == "safetensors.torch":
                    yield f"{here.path}:{item.line}: imports {item.name}; torch-free: {' -> '.join(path)}"
            for target, _ in tree.targets(here):
                if target.path not in seen:
                    seen.add(target.path)
                    queue.append((target, [*path, target.path]))


def environment(tree: Tree) -> Iterator[str]:
    """Environment variables are touched only where processes are launched and found."""
    names = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    for source in tree.house:
        if any(fnmatch(source.path, pattern) for pattern in ENVIRONMENT_READERS):
            continue
        for node in ast.walk(source.tree):
            of_os = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"
            if of_os and node.attr in names:
                yield f"{source.path}:{node.lineno}: os.{node.attr}: only in {' and '.join(ENVIRONMENT_READERS)}"
        for item in source.imports:
            if item.name in {f"os.{name}" for name in names}:
                yield f"{source.path}:{item.line}: {item.name}: only in {' and '.join(ENVIRONMENT_READERS)}"


def engine_choice(tree: Tree) -> Iterator[str]:
    """Which engine runs is decided in engines/build.py and nowhere else."""
    for source in tree.house:
        if source.path in ("megatron/engines/build.py", "megatron/config/schema.py"):
            continue
        for node in ast.walk(source.tree):
            compared = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            compared += [node.value] if isinstance(node, ast.MatchValue) else []
            if any(isinstance(inner, ast.Constant) and inner.value == "deepspeed" for inner in _flat(compared)):
                yield f"{source.path}:{node.lineno}: the engine's name is compared only in megatron/engines/build.py"


def _flat(nodes: list[ast.expr]) -> Iterator[ast.AST]:
    for node in nodes:
        yield from ast.walk(node)


def sizes(tree: Tree) -> Iterator[str]:
    """A file has at most 400 lines, a function 60, one in kernels 120."""
    native = [path for pattern in ("*.cpp", "*.h") for path in sorted((tree.root / "csrc").glob(pattern))]
    texts = [(source.path, source.text) for source in tree.sources]
    texts += [(path.relative_to(tree.root).as_posix(), path.read_text(encoding="utf-8")) for path in native]
    for path, text in texts:
        if (lines := len(text.splitlines())) > FILE_LINES:
            yield f"{path}:{lines}: {lines} lines, a file has at most {FILE_LINES}"
    for source in tree.sources:
        limit = KERNEL_LINES if source.package == "kernels" else FUNCTION_LINES
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > limit:
                    yield f"{source.path}:{node.lineno}: {node.name} has {lines} lines, a function at most {limit}"


def names(tree: Tree) -> Iterator[str]:
    """No file or folder is called utils, helpers, common or misc: a name says what is inside."""
    for folder in ("megatron", "tools", "examples", "benchmarks", "tests", "csrc"):
        for path in sorted((tree.root / folder).rglob("*")):
            if path.stem.lower() in EMPTY_NAMES and (path.is_dir() or path.suffix in (".py", ".cpp", ".h", ".toml")):
                yield f"{path.relative_to(tree.root).as_posix()}:1: {path.stem!r} says nothing about what is inside"


def packages(tree: Tree) -> Iterator[str]:
    """megatron is a namespace package, and no `__init__.py` holds code."""
    for source in tree.sources:
        if source.path == "megatron/__init__.py":
            yield f"{source.path}:1: megatron is a namespace package: an installed megatron-core must still import"
        if source.path.endswith("/__init__.py"):
            code = [node for node in source.tree.body if not _is_docstring(node)]
            if code:
                yield f"{source.path}:{code[0].lineno}: code in an __init__.py"


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def pickles(tree: Tree) -> Iterator[str]:
    """Nothing in the house reads a pickle (law C2); those of foreign files are data, and nothing of them runs."""
    for source in tree.house:
        for item in source.imports:
            if item.name.split(".")[0] in PICKLES:
                yield f"{source.path}:{item.line}: imports {item.name}: no pickle is ever read (law C2)"
            if item.name == INERT_PICKLE and not fnmatch(source.path, INERT_DOOR):
                yield f"{source.path}:{item.line}: {INERT_PICKLE} is imported only in {INERT_DOOR} (law C2)"
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                yield f"{source.path}:{node.lineno}: torch.load reads a pickle (law C2)"
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
                yield f"{source.path}:{node.value.lineno}: allow_pickle (law C2)"


def globals_of_state(tree: Tree) -> Iterator[str]:
    """No function rebinds a module's global."""
    for source in tree.house:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Global):
                yield f"{source.path}:{node.lineno}: global {', '.join(node.names)}: state is handed, not global"


RULES: tuple[Callable[[Tree], Iterator[str]], ...] = (
    layers,
    cycles,
    doors,
    torch_free,
    environment,
    engine_choice,
    sizes,
    names,
    packages,
    pickles,
    globals_of_state,
)


def complaints(root: Path) -> list[str]:
    """Everything in the tree below `root` that breaks a rule."""
    tree = Tree(root)
    return [complaint for rule in RULES for complaint in rule(tree)]
