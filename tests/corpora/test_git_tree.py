"""Repositories are read at HEAD and nothing in them is run. Oracle: `git ls-files`, `git show`."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from megatron.config.errors import DataError, UnavailableError
from megatron.corpora.blocks import cut_blocks, read_block
from megatron.corpora.document import Document
from megatron.corpora.reading import read_documents
from megatron.corpora.selection import ReadOptions, select_files

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
GIT = ReadOptions(git=True)


def git(folder: Path, *words: str) -> bytes:
    environment = {"PATH": os.environ["PATH"], "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1"}
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", *identity, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=True, timeout=60).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    files = {
        "a.py": b"a\n",
        "src/b.rs": b"b\n",
        "src/\xc3\xa9 x\n.c": b"name",
        "forced.log": b"tracked though ignored",
        ".gitignore": b"*.log\n",
        "image.png": b"\0\1",
        "big.txt": b"x" * 5000,
        "LICENSE": b"Mozilla Public License Version 2.0",
        "data.jsonl": b'{"text": "j"}\n',
    }
    for name, content in files.items():
        path = root / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    os.symlink("/etc/passwd", root / "link")
    git(root, "init", "-q")
    git(root, "add", "-f", ".")
    git(root, "commit", "-q", "-m", "one")
    (root / "untracked.py").write_text("untracked")
    (root / "a.py").write_text("changed, not committed")
    return root


def test_tracked_files_at_head(repository: Path, tmp_path: Path) -> None:
    tracked = [os.fsdecode(name) for name in git(repository, "ls-files", "-z").split(b"\0")[:-1]]
    left_out = {"image.png", "link", "data.jsonl"}
    expected = {name: git(repository, "show", f"HEAD:{name}").decode() for name in tracked if name not in left_out}
    skipped: Counter[str] = Counter()
    found = list(read_documents([repository], GIT, skipped=skipped))
    assert [d.id for d in found] == sorted(expected)
    assert {d.id: d.text for d in found} == expected
    assert {d.licence for d in found} == {"MPL-2.0"}
    assert {d.id: d.language for d in found}["src/b.rs"] == "Rust"
    assert skipped == {"binary file": 1, "link in a git repository": 1, "data file in a git repository": 1}
    for size in (1, 10, 6000):
        blocks = cut_blocks(select_files([repository], options=GIT), GIT, size)
        assert [item for block in blocks for item in read_block(block, GIT)] == found
    git(tmp_path, "clone", "-q", "--bare", str(repository), "bare.git")
    assert list(read_documents([tmp_path / "bare.git"], GIT)) == found
    assert [d.id for d in read_documents([repository], ReadOptions(git=True, suffixes=(".py",)))] == ["a.py"]


def test_folders_of_repositories_worktrees_and_submodules(repository: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "-q", str(repository), "all/one")
    (tmp_path / "all" / "two").mkdir()
    (tmp_path / "all" / "two" / "plain.py").write_text("plain")
    git(repository, "worktree", "add", "-q", str(tmp_path / "worktree"))
    names = [d.id for d in read_documents([repository], GIT)]
    assert [d.id for d in read_documents([tmp_path / "all"], GIT)] == [
        *(f"one/{name}" for name in names),
        "two/plain.py",
    ]
    assert [d.id for d in read_documents([tmp_path / "worktree"], GIT)] == names
    # a .git file that leads out of the folder is not followed there
    inner = tmp_path / "all" / "evil"
    inner.mkdir()
    (inner / ".git").write_text(f"gitdir: {repository}/.git\n")
    assert not [d for d in read_documents([tmp_path / "all"], GIT) if d.id.startswith("evil/")]
    (repository / "sub").mkdir()
    git(repository, "update-index", "--add", "--cacheinfo", f"160000,{'1' * 40},sub")
    git(repository, "commit", "-q", "-m", "two")
    skipped: Counter[str] = Counter()
    assert [d.id for d in read_documents([repository], GIT, skipped=skipped)] == names
    assert skipped["submodule"] == 1


def test_nothing_that_a_repository_names_is_run(repository: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap.sh"
    trap.write_text(f"#!/bin/sh\ntouch {tmp_path}/sprung\ncat\n")
    trap.chmod(0o755)
    for hook in ("post-checkout", "post-index-change", "pre-auto-gc", "fsmonitor-watchman", "reference-transaction"):
        shutil.copy(trap, repository / ".git" / "hooks" / hook)
    with (repository / ".git" / "config").open("a") as config:
        config.write(
            f"[core]\n fsmonitor = {trap}\n pager = {trap}\n sshCommand = {trap}\n gitProxy = {trap}\n"
            f" askPass = {trap}\n"
            f" alternateRefsCommand = {trap}\n editor = {trap}\n"
            f'[diff "x"]\n textconv = {trap}\n command = {trap}\n[filter "x"]\n smudge = {trap}\n clean = {trap}\n'
            f" process = {trap}\n required = true\n[alias]\n ls-tree = !{trap}\n cat-file = !{trap}\n"
            f"[credential]\n helper = !{trap}\n[pager]\n ls-tree = {trap}\n cat-file = {trap}\n"
            f'[remote "origin"]\n url = ext::{trap}\n promisor = true\n uploadpack = {trap}\n'
            f'[protocol "ext"]\n allow = always\n[extensions]\n partialClone = origin\n'
        )
    (repository / ".git" / "info").mkdir(exist_ok=True)
    (repository / ".git" / "info" / "attributes").write_text("* diff=x filter=x text working-tree-encoding=utf-16\n")
    found = [d.id for d in read_documents([repository], GIT)]
    assert "a.py" in found and not (tmp_path / "sprung").exists()
    identifier = git(repository, "rev-parse", "HEAD:src/b.rs").decode().strip()
    (repository / ".git" / "objects" / identifier[:2] / identifier[2:]).unlink()
    with pytest.raises(DataError):  # a missing object is not fetched from where the repository says
        list(read_documents([repository], GIT))
    assert not (tmp_path / "sprung").exists()


def test_B1_broken_repositories_are_named(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    git(tmp_path / "empty", "init", "-q")
    with pytest.raises(DataError, match="no commit at HEAD"):
        list(read_documents([tmp_path / "empty"], GIT))
    git(tmp_path, "clone", "-q", "--bare", str(repository), "bare.git")
    with pytest.raises(DataError, match=r"bare\.git: .*read it with --git"):
        list(read_documents([tmp_path / "bare.git"]))
    files = select_files([repository], options=GIT)
    (blob,) = [file.object_id for file in files if file.name == "big.txt"]
    stored = repository / ".git" / "objects" / blob[:2] / blob[2:]
    stored.chmod(0o644)
    whole = stored.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"garbage"):
        stored.write_bytes(content)
        with pytest.raises(DataError, match=r"repository/\.git: .*git fsck"):
            list(read_documents([repository], GIT))
    stored.unlink()
    with pytest.raises(DataError, match=r"repository/\.git: big\.txt: .*missing.*git fsck"):
        list(read_documents([repository], GIT))
    (repository / ".git" / "HEAD").write_text("garbage")
    with pytest.raises(DataError, match=r"repository/\.git: git cannot read"):
        list(read_documents([repository], GIT))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UnavailableError, match="git is not installed"):
        list(read_documents([repository], GIT))


def test_documents_that_are_too_long_are_bad_records(repository: Path) -> None:
    options = ReadOptions(git=True, max_document_bytes=4000)
    blocks = cut_blocks(select_files([repository], options=options), options, 1 << 20)
    bad = [item for block in blocks for item in read_block(block, options) if not isinstance(item, Document)]
    assert len(bad) == 1 and "big.txt has more than 4000 bytes" in bad[0].reason
