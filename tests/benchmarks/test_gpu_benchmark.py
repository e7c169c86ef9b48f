"""benchmarks/gpu.py without a GPU: its dry run from end to end, and the arithmetic that its figures rest on."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu
import gpu_device_tests
import gpu_job
import gpu_operations
import gpu_results
import gpu_setting


def run(repository: Path, *words: str, program: str = "", timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """The script as a process; program: Python that runs before it, in the same process."""
    start = ["benchmarks/gpu.py"]
    if program:
        run_it = "import runpy, sys; sys.argv[0] = 'benchmarks/gpu.py'; sys.path[:0] = ['benchmarks']; "
        start = ["-c", f"{run_it}{program}; runpy.run_path(sys.argv[0], run_name='__main__')"]
    return subprocess.run(
        [sys.executable, *start, *words], capture_output=True, text=True, timeout=timeout, cwd=repository
    )


@pytest.mark.long
@pytest.mark.timeout(1600)
def test_a_dry_run_walks_through_every_part(repository: Path, tmp_path: Path) -> None:
    # one test, so that one process of many that test runs it
    results = repository / "benchmarks" / "results"
    before = sorted(results.iterdir())
    done = run(repository, "--dry-run", "--output", str(tmp_path), "--seed", "1", "--limit", "900", timeout=1500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert sorted(results.iterdir()) == before and done.stdout.rstrip().endswith(gpu_results.DRY)
    (path,) = tmp_path.glob("*-gpu-dry.json")
    dry, words = json.loads(path.read_text()), path.with_suffix(".md").read_text()
    assert dry["dry_run"] == gpu_results.DRY and gpu_results.DRY in words
    (only,) = dry["runs"]
    assert {"command", "started", "commit", "device", "driver", "torch", "CUDA", "triton", "python"} <= only.keys()
    assert "DRY RUN" in only["device"]
    for part in gpu.PARTS:
        held = dry["parts"][part]
        assert held["rows"] and not held["left_out"], held
        assert not [row for row in held["rows"] if "failed" in row]
        assert f"## {part}: {held['title']}" in words
    _check_operations(dry["parts"])
    _check_training(dry["parts"]["d"]["rows"])
    assert list(tmp_path.glob("*-profile.txt")) and list(tmp_path.glob("*-tests.log"))


def _check_operations(parts: dict[str, Any]) -> None:
    """Every way of every operation is checked and timed."""
    for part in ("b", "c"):
        seen = {(row["operation"], row["way"]) for row in parts[part]["rows"]}
        for name, operation in gpu_operations.all_operations().items():
            ways = {way for way in operation.ways if part == "c" or way != "compile"}
            assert {(name, way) for way in ways} <= seen, (part, name)
    found = [row for row in parts["b"]["rows"] if row["way"] == "triton"]
    assert found and all("error" in row for row in found)


def _check_training(rows: list[dict[str, Any]]) -> None:
    """Rows say what ran."""
    choice, *rows = rows
    assert choice["job"] == "choice" and choice["norm"] == "triton" and "measured a step" in choice["reason"]
    assert {row["from"] for row in rows} == {"the loader", "random tokens"}
    assert {row["documents"] for row in rows} == {1, 4} and {row["AdamW"] for row in rows} == {
        "torch",
        "triton, split masters",
    }
    assert {"llama-1b, CUDA graphs", "llama-1b, fused gradients"} <= {row["model"] for row in rows}
    assert any(row["gradients"] == "bf16" and row["recomputed"] == "1 of 2 layers" for row in rows)
    assert all("norm triton" in row["kernels"] and 5 < row["loss"] < 7 for row in rows), rows


def _context(tmp_path: Path, **arguments: Any) -> gpu_job.Context:
    words = {"device": "none", "command": "test"}
    results, clock = gpu_results.Results(tmp_path, words, dry=True), gpu_job.Clock(1000)
    given = Namespace(**{"only": None, "profile": "", "choose_again": False, **arguments})
    return gpu_job.Context(torch.device("cpu"), True, 1, tmp_path, results, clock, clock, given)


def test_missing_packages_are_named_with_the_command_that_mends_it(repository: Path) -> None:
    hide = "sys.modules['pydantic'] = None; sys.modules['safetensors'] = None"
    done = run(repository, "--dry-run", "--part", "a", program=hide)
    assert done.returncode == 6 and "Traceback" not in done.stderr
    assert "pydantic, safetensors cannot be imported" in done.stderr
    assert "-m pip install 'pydantic>=2.10' 'safetensors>=0.5'" in done.stderr and "--wheels" in done.stderr


def test_without_a_gpu_the_script_says_so(repository: Path) -> None:
    done = run(repository, "--part", "a", program="import os; os.environ['CUDA_VISIBLE_DEVICES'] = ''")
    assert done.returncode == 6 and "--dry-run" in done.stderr


def test_wheels_are_installed_from_a_folder(tmp_path: Path, repository: Path) -> None:
    info = "brought_along-1.0.dist-info"
    with zipfile.ZipFile(tmp_path / "brought_along-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("brought_along.py", "VALUE = 7\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: brought-along\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", f"brought_along.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    program = (
        "import os, subprocess, sys; from pathlib import Path; import gpu_setting; "
        f"gpu_setting.use_wheels(Path({str(tmp_path)!r})); import brought_along; "
        "sys.exit(subprocess.run([sys.executable, '-c', 'import brought_along']).returncode or brought_along.VALUE)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=repository / "benchmarks", timeout=120)
    assert done.returncode == 7
    with pytest.raises(SystemExit, match="no wheel is there"):
        gpu_setting.use_wheels(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "words", [["--part", "g"], ["--limit", "soon"], ["--limit", "x=3"], ["--dry-run", "--output", str(gpu.RESULTS)]]
)
def test_mistakes_on_the_command_line_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu.arguments_of(words)
    assert stopped.value.code == 2 and capsys.readouterr().err


def test_a_name_that_no_job_has_is_refused_with_those_that_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--dry-run", "--part", "a,f", "--only", "pytest", "--only", "no such job", "--output", str(tmp_path)]
    assert gpu._run(gpu.arguments_of(words), words, tmp_path) == 2
    said = capsys.readouterr()
    assert "--only 'no such job': no job has that in its name" in said.err and not said.out
    assert "a: memory; gemm bf16" in said.err and "f: pytest -m gpu" in said.err and not list(tmp_path.iterdir())


def test_limits_by_part() -> None:
    assert gpu.limits_of("240")["f"] == 240
    assert gpu.limits_of("a=30,d=400") == {"a": 30, "b": 500, "c": 500, "d": 400, "e": 500, "f": 500}


def _module(monkeypatch: pytest.MonkeyPatch, jobs: Sequence[gpu_job.Job]) -> str:
    module = SimpleNamespace(TITLE="title", NOTES="notes", jobs=lambda context: iter(jobs))
    monkeypatch.setitem(sys.modules, "gpu_made_up", module)  # type: ignore[arg-type]
    return "gpu_made_up"


def test_a_part_without_time_says_what_it_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = _context(tmp_path)

    def takes_all() -> list[dict[str, Any]]:
        context.clock = gpu_job.Clock(-1)
        return [{"value": 1.5}]

    jobs = [gpu_job.Job("first", takes_all), gpu_job.Job("second", takes_all), gpu_job.Job("third", takes_all)]
    assert gpu._part(context, "a", _module(monkeypatch, jobs), [], gpu.Resume(), 0) == []
    held = json.loads(context.results.path.read_text())["parts"]["a"]
    assert [row["job"] for row in held["rows"]] == ["first"]
    assert held["left_out"] == ["second (no time)", "third (no time)"]
    assert "Left out: second (no time); third (no time)." in context.results.path.with_suffix(".md").read_text()


def test_a_job_or_a_module_that_breaks_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    context = _context(tmp_path)
    jobs = [gpu_job.Job("breaks", lambda: [1 / 0]), gpu_job.Job("works", lambda: [{"value": 2}])]  # type: ignore[list-item]
    failed = gpu._part(context, "b", _module(monkeypatch, jobs), [], gpu.Resume(), 0)
    assert failed == ["b: failed ZeroDivisionError: division by zero"]
    assert gpu._part(context, "c", "gpu_that_is_not_there", [], gpu.Resume(), 0)[0].startswith(
        "c: failed ModuleNotFound"
    )
    assert {row["job"] for row in context.results.rows("b")} == {"breaks", "works"}


def test_a_lost_gpu_is_left_to_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context, begun = _context(tmp_path), []
    jobs = [gpu_job.Job(name, lambda: [{"failed": "illegal access"}]) for name in ("one", "two", "three")]
    name = _module(monkeypatch, jobs)
    monkeypatch.setattr(gpu_job.Context, "cuda", property(lambda self: True))
    monkeypatch.setattr(gpu, "_device_is_lost", lambda: len(begun) == 0 and len(context.results.rows("b")) == 2)
    monkeypatch.setattr(gpu.os, "execv", lambda program, argv: begun.append(argv))
    gpu._part(
        context, "b", name, ["--part", "b", "--resume", "b", "zero", "9", "4"], gpu.Resume("b", "zero", 9.0, 4), 3
    )
    ((_, script, *words),) = begun
    assert script.endswith("gpu.py") and words[:5] == ["--part", "b", "--resume", "b", "two"]
    assert words[6] == "9" and words[7] == "--total"  # 4 before, 3 of other parts, and both of these
    again = gpu.Resume.of(gpu.arguments_of(words).resume)
    assert [job.name for job in again.left("b", jobs)] == ["three"] and again.left("c", jobs) == jobs


def test_a_job_replaces_its_own_rows_alone(tmp_path: Path) -> None:
    first = gpu_results.Results(tmp_path, {"device": "one"}, dry=False)
    first.begin("a", "title", "notes")
    first.add("a", "copy", [{"TB/s": 1.0}])
    first.add("a", "gemm", [{"TFLOP/s": 2.0}])
    second = gpu_results.Results(tmp_path, {"device": "two"}, dry=False)
    second.add("a", "copy", [{"TB/s": 3.0}])
    assert [(row["job"], row["run"]) for row in second.rows("a")] == [("gemm", 1), ("copy", 2)]
    assert [row["job"] for row in second.rows_here("a")] == ["copy"]
    words = second.path.with_suffix(".md").read_text()
    assert "| 1 | one |" in words and "| 2 | two |" in words and "| copy | 3 | 2 |" in words
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "-"),
        (True, "True"),
        (1234567, "1,234,567"),
        (0.000123456, "0.0001235"),
        (51234.4, "51,234"),
        (9999, "9999"),
    ],
)
def test_numbers_in_tables(value: object, words: str) -> None:
    assert gpu_results.cell(value) == words


def test_which_files_are_searched_for_gpu_tests(repository: Path) -> None:
    found = gpu_device_tests.files_with_gpu_tests()
    assert "tests/kernels/test_swiglu_triton.py" in found and "tests/test_architecture.py" not in found


@pytest.mark.parametrize(
    ("code", "lines", "words"),
    [
        (0, ["3 passed, 2 skipped"], None),
        (0, ["9 skipped in 3s"], "every test was skipped"),
        (5, [], "no test"),
        (None, [], "not done"),
        (1, ["FAILED a.py::b - x"], "a.py::b"),
    ],
)
def test_the_verdict_on_pytest(code: int | None, lines: list[str], words: str | None) -> None:
    row = gpu_device_tests._verdict(code, lines, 100.0)
    assert (words is None and not row) or (words is not None and words in row["failed"])
