"""Conversations through the whole of preprocessing: P.bin, P.idx, P.json and P.mask against transformers; kills,
shards, duplicates, lengths, bad records."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora.chat_templates_made import CHATML, CHATML_MARKED, LLAMA2, transformers_tokenizer, write_tokenizer
from preprocessing.corpora import digests, manifest_of, read_indexed

from megatron.commands.preprocess_data import main
from megatron.config.errors import ConfigError, DataError
from megatron.corpora.chat_options import ChatOptions
from megatron.corpora.cleaning import CleaningOptions
from megatron.corpora.read_options import ReadOptions
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.loss_mask import LossMask
from megatron.preprocessing.merge import merge
from megatron.preprocessing.options import PreprocessOptions, Shard
from megatron.preprocessing.run import preprocess

READ = ReadOptions(chat_format="auto")


def chats_of(seed: int, count: int) -> list[list[dict[str, str]]]:
    draw = random.Random(seed)
    words = [
        "the user",
        "answers",
        "12",
        "caf\u00e9",
        "\u6570",
        "\n",
        "<|im_end|>",
        "<|im_start|>assistant",
        "</s>",
        "No!",
    ]

    def said() -> str:
        return "w " + " ".join(draw.choices(words, k=draw.choice([1, 3, 10, 60]))) + " e"

    chats = []
    for _ in range(count):
        turns = [
            {"role": "user" if n % 2 == 0 else "assistant", "content": said()} for n in range(2 * draw.randint(1, 3))
        ]
        chats.append(turns)
    return chats


def write_chats(path: Path, chats: list[Any]) -> Path:
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in chats), encoding="utf-8")
    return path


def mask_of(prefix: Path) -> list[int]:
    """P.mask, read bit by bit as its page says; shares no code with ours."""
    manifest: Any = manifest_of(prefix)
    content = Path(f"{prefix}.mask").read_bytes()
    stated = manifest["loss_mask"]
    assert hashlib.sha256(content).hexdigest() == stated["sha256"] and len(content) == stated["bytes"]
    bits = [(content[n // 8] >> (n % 8)) & 1 for n in range(len(content) * 8)]
    assert not any(bits[manifest["tokens"] :]) and sum(bits) == stated["target_tokens"]
    return bits[: manifest["tokens"]]


def documents(prefix: Path) -> list[tuple[list[int], list[int]]]:
    """Ids and targets of each document."""
    bits, at, found = mask_of(prefix), 0, []
    for ids in read_indexed(prefix):
        found.append((ids, bits[at : at + len(ids)]))
        at += len(ids)
    assert at == len(bits)
    return found


def all_digests(prefix: Path) -> dict[str, str]:
    return digests(prefix) | {"mask": hashlib.sha256(Path(f"{prefix}.mask").read_bytes()).hexdigest()}


def options(**changes: Any) -> PreprocessOptions:
    chat = {name: changes.pop(name) for name in ("template", "max_tokens", "too_long") if name in changes}
    return PreprocessOptions(READ, chat=ChatOptions(**({"template": "chatml"} | chat)), block_bytes=2000, **changes)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def expected_documents(tokenizer: Path, chats: list[Any]) -> list[tuple[list[int], list[int]]]:
    """ids and masks by transformers: what messages spell is protected by its own `sanitize_control_tokens`; the masks
    by encoding each part between tokens of the template apart."""
    theirs = transformers_tokenizer(tokenizer)
    special = theirs.convert_tokens_to_ids
    found = []
    for turns in chats:
        ids = theirs.apply_chat_template(
            turns, chat_template=CHATML, tokenize=True, return_dict=False, sanitize_control_tokens=True
        )
        targets, own = [], []
        for turn in turns:
            begin = theirs.encode(f"{turn['role']}\n", add_special_tokens=False)
            content = theirs.encode(turn["content"], add_special_tokens=False, split_special_tokens=True)
            end = theirs.encode("\n", add_special_tokens=False)
            own += [special("<|im_start|>"), *begin, *content, special("<|im_end|>"), *end]
            on = int(turn["role"] == "assistant")
            targets += [0] * (1 + len(begin)) + [on] * (len(content) + 1) + [0] * len(end)
        assert theirs.decode(own) == theirs.decode(ids)
        found.append(([*own, special("<|endoftext|>")], [*targets, 0]))
    return found


def test_documents_and_masks_are_those_of_transformers(tmp_path: Path, tokenizer: Path) -> None:
    chats = chats_of(1, 60)
    corpus = write_chats(tmp_path / "c.jsonl", chats)
    preprocess([corpus], tmp_path / "p", tokenizer, options=options())
    assert documents(tmp_path / "p") == expected_documents(tokenizer, chats)
    (tmp_path / "m.jinja").write_text(CHATML_MARKED)
    (tmp_path / "u.jinja").write_text(CHATML)
    for name in ("m", "u"):  # what the template marks, and what a turn adds, are the same here
        preprocess([corpus], tmp_path / name, tokenizer, options=options(template=str(tmp_path / f"{name}.jinja")))
        assert documents(tmp_path / name) == documents(tmp_path / "p")
    manifest: Any = manifest_of(tmp_path / "u")
    assert manifest["chat"]["template"]["text"] == CHATML and "adds" in manifest["chat"]["loss_from"]
    assert manifest["chat"]["template"]["sha256"] == hashlib.sha256(CHATML.encode()).hexdigest()


def test_workers_shards_and_blocks_change_no_byte(tmp_path: Path, tokenizer: Path) -> None:
    chats = chats_of(2, 40)
    corpus = write_chats(tmp_path / "c.jsonl", chats + chats[:15])
    made = PreprocessOptions(READ, CleaningOptions(exact="exact"), chat=ChatOptions("chatml"), block_bytes=1500)
    preprocess([corpus], tmp_path / "whole", tokenizer, options=made, workers=2)
    kept = [chat for number, chat in enumerate(chats) if chat not in chats[:number]]
    assert documents(tmp_path / "whole") == expected_documents(tokenizer, kept)
    for number in (2, 1, 3):
        preprocess([corpus], tmp_path / "p", tokenizer, options=made, shard=Shard(number, 3))
    merge(tmp_path / "p")
    assert {k: v for k, v in all_digests(tmp_path / "p").items() if k != ".json"} == {
        k: v for k, v in all_digests(tmp_path / "whole").items() if k != ".json"
    }


SCRIPT = """\
import sys, time
from megatron.commands.frame import run_command
from megatron.corpora.chat_options import ChatOptions
from megatron.corpora.cleaning import CleaningOptions
from megatron.corpora.read_options import ReadOptions
from megatron.preprocessing.options import PreprocessOptions
from megatron.preprocessing.run import preprocess

def main(argv):
    corpus, prefix, tokenizer, pause = sys.argv[1:]
    options = PreprocessOptions(
        ReadOptions(chat_format="auto"),
        chat=ChatOptions("chatml", max_tokens=60, too_long="truncate"),
        block_bytes=2000,
    )
    outcome = preprocess([corpus], prefix, tokenizer, options=options, progress=lambda now: time.sleep(float(pause)))
    print("kept", outcome.parts_kept)
    return 0

if __name__ == "__main__":
    sys.exit(run_command(main))
"""


@pytest.mark.parametrize("seed", [1, 2])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, tokenizer: Path, seed: int) -> None:
    draw = random.Random(seed)
    corpus = write_chats(tmp_path / "c.jsonl", chats_of(3, 200))
    (tmp_path / "run.py").write_text(SCRIPT)
    preprocess([corpus], tmp_path / "whole", tokenizer, options=options(max_tokens=60, too_long="truncate"))
    command = [sys.executable, str(tmp_path / "run.py"), str(corpus), str(tmp_path / "p"), str(tokenizer)]
    for _ in range(3):
        with subprocess.Popen([*command, "0.05"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            time.sleep(draw.uniform(0.8, 3.0))
            process.kill()
        assert not (tmp_path / "p.idx").exists() or (tmp_path / "p.mask").exists()
        if (tmp_path / "p.idx").exists():
            break
    else:
        done = subprocess.run([*command, "0"], text=True, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr
    assert all_digests(tmp_path / "p") == all_digests(tmp_path / "whole")
    assert not list(tmp_path.glob("p.*partial")) and not (tmp_path / "p.parts").exists()


def test_what_becomes_of_long_conversations(tmp_path: Path, tokenizer: Path) -> None:
    chats = chats_of(4, 60)
    corpus = write_chats(tmp_path / "c.jsonl", chats)
    whole = expected_documents(tokenizer, chats)
    eod, most = whole[0][0][-1], 150
    long = [row for row in whole if len(row[0]) > most]
    cut = [([*ids[: most - 1], eod], [*on[: most - 1], 0]) for ids, on in long]
    assert 10 < len(long) < 55 and not all(any(on) for _, on in cut) and any(any(on) for _, on in cut)

    preprocess([corpus], tmp_path / "d", tokenizer, options=options(max_tokens=most, too_long="drop"))
    assert documents(tmp_path / "d") == [row for row in whole if len(row[0]) <= most]
    dropped: Any = manifest_of(tmp_path / "d")
    assert dropped["skipped"] == {"longer than max_tokens": len(long)} and dropped["counts"]["records"] == 60

    preprocess([corpus], tmp_path / "t", tokenizer, options=options(max_tokens=most, too_long="truncate"))
    fitted = [row if len(row[0]) <= most else ([*row[0][: most - 1], eod], [*row[1][: most - 1], 0]) for row in whole]
    assert documents(tmp_path / "t") == [row for row in fitted if any(row[1])]
    truncated: Any = manifest_of(tmp_path / "t")
    assert truncated["counts"]["chat"] == {"truncated to max_tokens": sum(any(on) for _, on in cut)}
    theirs = transformers_tokenizer(tokenizer)
    said = [theirs.decode(ids[:-1]).encode() for ids, on in fitted if any(on)]
    assert abs(truncated["bytes_of_text"] - sum(map(len, said))) <= 3 * len(said)  # a letter may be cut
    assert truncated["skipped"] == {"no loss within max_tokens": sum(not any(on) for _, on in cut)}

    first = next(n for n, row in enumerate(whole, start=1) if len(row[0]) > most)
    with pytest.raises(
        DataError, match=rf"c.jsonl: line {first}: the conversation has \d+ tokens, more than max_tokens"
    ):
        preprocess([corpus], tmp_path / "e", tokenizer, options=options(max_tokens=most))
    preprocess([corpus], tmp_path / "q", tokenizer, options=options(max_tokens=most, on_error="quarantine"))
    lines = [json.loads(line)["line"] for line in (tmp_path / "q.quarantine.jsonl").read_text().splitlines()]
    assert lines == [n for n, row in enumerate(whole, start=1) if len(row[0]) > most]
    assert documents(tmp_path / "q") == documents(tmp_path / "d")


def test_the_end_of_the_document_is_learned_where_nothing_else_ends_the_turn(tmp_path: Path) -> None:
    """A template without end of turn; one that ends in the end of the document itself; one with an end of its own."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    corpus = write_chats(tmp_path / "c.jsonl", [turns])
    bare = "{% for m in messages %}{{ m.role[0] + ':' + m.content }}{% endfor %}"
    bare += "{% if add_generation_prompt %}a:{% endif %}"
    own = write_tokenizer(tmp_path / "own", eos_token="<|endoftext|>")  # which is also the end of a document
    texts = {"bare": bare, "llama2": LLAMA2, "chatml": CHATML}
    told = {}
    for name, text in texts.items():
        (tmp_path / f"{name}.jinja").write_text(text)
        preprocess([corpus], tmp_path / name, own, options=options(template=str(tmp_path / f"{name}.jinja")))
        ids, on = documents(tmp_path / name)[0]
        eod = read_indexed(tmp_path / name)[0][-1]
        told[name] = ([i == eod for i in ids][-2:], on[-3:])
    assert told["bare"] == ([False, True], [0, 1, 1])
    assert told["llama2"] == ([False, True], [1, 1, 1])
    assert told["chatml"] == ([False, True], [1, 0, 0])


def test_bad_records_follow_on_error(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = chats_of(5, 2)
    rows = [{"messages": turns[0]}, {"messages": turns[1][:1]}, {"text": "x"}, {"messages": turns[1]}]
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--input", str(corpus), "--output-prefix", str(tmp_path / "p"), "--tokenizer", str(tokenizer)]
    command += ["--format", "chat", "--chat-template", "chatml", "--workers", "1"]
    with pytest.raises(DataError, match=r"c\.jsonl: line 2: no message is the assistant's"):
        main(command)
    assert main([*command, "--on-error", "quarantine"]) == 0
    assert documents(tmp_path / "p") == expected_documents(tokenizer, turns)
    assert [json.loads(line)["line"] for line in (tmp_path / "p.quarantine.jsonl").read_text().splitlines()] == [2, 3]
    told = capsys.readouterr().out
    assert "the loss is on" in told and "built-in chatml" in told and "quarantined" in told


def test_a_changed_template_is_other_work(tmp_path: Path, tokenizer: Path) -> None:
    corpus = write_chats(tmp_path / "c.jsonl", chats_of(6, 40))
    (tmp_path / "t.jinja").write_text(CHATML)
    made = options(template=str(tmp_path / "t.jinja"))
    preprocess([corpus], tmp_path / "p", tokenizer, options=made, shard=Shard(1, 2))
    (tmp_path / "t.jinja").write_text(CHATML_MARKED)
    with pytest.raises(ConfigError, match=r"options\.chat\.\w+"):
        preprocess([corpus], tmp_path / "p", tokenizer, options=made, shard=Shard(2, 2))


def test_text_data_have_no_mask_and_the_same_manifest_as_before(tmp_path: Path) -> None:
    """A dataset of conversations that texts replace leaves no mask behind; nothing of it is in a manifest of texts."""
    corpus = write_chats(tmp_path / "c.jsonl", chats_of(7, 5))
    preprocess([corpus], tmp_path / "p", "bytes", options=options())
    assert (tmp_path / "p.mask").exists()
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "words"}) + "\n")
    preprocess([tmp_path / "t.jsonl"], tmp_path / "p", "bytes", overwrite=True)
    assert not (tmp_path / "p.mask").exists()
    manifest = manifest_of(tmp_path / "p")
    assert not {"chat", "loss_mask"} & manifest.keys()
    assert "chat_format" not in manifest["options"] and "chat" not in manifest["counts"]  # type: ignore[operator]
    for wrong in (["--max-tokens", "8"], ["--chat-template", "chatml"]):
        with pytest.raises(ConfigError, match="give --format chat too"):
            main(["--input", "x", "--output-prefix", "y", "--tokenizer", "bytes", *wrong])
    with pytest.raises(ConfigError, match="nothing is too long without a limit: give --max-tokens"):
        main([
            "--input", "x", "--output-prefix", "y", "--tokenizer", "bytes", "--format", "chat", "--too-long", "drop",
        ])  # fmt: skip


def test_the_mask_is_read_as_it_was_written(tmp_path: Path, tokenizer: Path) -> None:
    corpus = write_chats(tmp_path / "c.jsonl", chats_of(8, 40))
    preprocess([corpus], tmp_path / "p", tokenizer, options=options())
    dataset = IndexedDataset(tmp_path / "p")  # which opens as ever, its mask unread
    mask, bits = LossMask.open(tmp_path / "p", dataset.manifest or {}), mask_of(tmp_path / "p")
    starts = dataset.document_starts().tolist()
    draw = random.Random(1)
    ranges = [*zip(starts, starts[1:], strict=False), (0, len(bits)), (5, 5)]
    ranges += [tuple(sorted(draw.choices(range(len(bits) + 1), k=2))) for _ in range(200)]  # type: ignore[misc]
    for start, end in ranges:
        assert np.array_equal(mask.bits(start, end), np.array(bits[start:end], bool))
        assert mask.count(start, end) == sum(bits[start:end])
    assert mask.packed.base is not None and not mask.packed.flags.writeable  # the mapped file itself
    with pytest.raises(IndexError):
        mask.bits(0, len(bits) + 1)
