"""Records of instruction data to conversations: each format, and everything that is none."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron.corpora.blocks import absolute_line, cut_blocks
from megatron.corpora.chat_reading import read_chats
from megatron.corpora.chat_records import Conversation, Flaw, conversation_of, learned_messages
from megatron.corpora.document import BadRecord
from megatron.corpora.read_options import ReadOptions
from megatron.corpora.selection import select_files

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"name": "add", "arguments": {"left": 1}}
CALLED = {"type": "function", "function": CALL}


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": [USER, ANSWER]}, [USER, ANSWER]),
        ({"messages": [USER | {"name": None}, ANSWER | {"tool_calls": None}]}, [USER, ANSWER]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER]}, [USER, ANSWER]),
        ({"prompt": "q", "completion": "a"}, [USER, ANSWER]),
        ({"prompt": [USER], "completion": [ANSWER], "messages": None}, [USER, ANSWER]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [USER, ANSWER]),
        ({"conversations": [USER, ANSWER]}, [USER, ANSWER]),
        (
            {"system": "s", "conversations": [{"from": "user", "value": "q"}, {"from": "chatgpt", "value": "a"}]},
            [{"role": "system", "content": "s"}, USER, ANSWER],
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": CALL}]}]},
            [USER, {"role": "assistant", "tool_calls": [{"id": "1"} | CALLED]}],
        ),
        (
            {"messages": [USER, {"role": "assistant", "function_call": {"name": "add", "arguments": '{"left": 1}'}}]},
            [USER, {"role": "assistant", "tool_calls": [CALLED]}],
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": json.dumps(CALL)}]},
            [USER, {"role": "assistant", "tool_calls": [CALLED]}],
        ),
    ],
)
def test_each_format_gives_the_same_messages(record: dict[str, Any], messages: list[Any]) -> None:
    assert conversation_of(record, "auto")[0] == messages


def test_alpaca_keeps_its_input_apart() -> None:
    question, answer = conversation_of({"instruction": "Add.", "input": "1 2", "output": "3"}, "auto")[0]
    assert question == {"role": "user", "content": "Add.\n\n1 2", "instruction": "Add.", "input": "1 2"}
    assert answer == {"role": "assistant", "content": "3"}
    assert conversation_of({"instruction": "Hi", "input": "", "output": "a"}, "alpaca")[0][0]["content"] == "Hi"


def test_weights_choose_what_is_learned() -> None:
    turns = [USER, ANSWER | {"weight": 0}, USER, ANSWER | {"weight": 1}]
    assert learned_messages(turns) == {3}
    asked = conversation_of({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}, "auto")[0]
    assert learned_messages(asked) == {3}  # an answer in the prompt is not learned


BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": [USER]}, "no message is the assistant's"),
    ({"messages": []}, "no message"),
    ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "empty (message 1)"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "no content (message 1"),
    ({"messages": [{"role": "bot", "content": "x"}]}, "role 'bot' is unknown"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "is unknown"),
    ({"messages": [{"role": "user", "content": 3}, ANSWER]}, "this is a number (message 0, user)"),
    ({"messages": "x"}, "a list of messages is expected"),
    ({"messages": ["x"]}, "an object is expected, this is a string (message 0)"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "only text is trained on"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {}}]}]}, "a tool call has no name"),
    (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "is not JSON: '{'",
    ),
    ({"messages": [USER, ANSWER | {"weight": 0}]}, "weight 0: there is nothing to learn"),
    ({"messages": [USER, ANSWER | {"weight": 0.5}]}, "weight 0.5 is unknown"),
    ({"conversations": [{"from": "alien", "value": "x"}]}, "from 'alien' is unknown"),
    ({"conversations": [{"from": "gpt"}]}, "'from' and 'value'"),
    ({"instruction": "x", "output": None}, "no chat format has these fields"),
    ({"instruction": "x", "output": 7}, "field 'output': a string is expected, this is a number"),
    ({"instruction": " ", "output": "x"}, "field 'instruction' is empty"),
    ({"text": "x"}, "no chat format has these fields (fields: 'text')"),
    ({"messages": [USER, ANSWER], "prompt": "q", "completion": "a"}, "as messages and as prompt-completion"),
    ({"prompt": "q", "completion": {}}, "a string or a list of messages"),
    ({"messages": [USER, ANSWER], "tools": "{"}, "the field 'tools' is not JSON"),
    ({"messages": [USER, ANSWER], "tools": [1]}, "a list of JSON schemas"),
]


@pytest.mark.parametrize(("record", "reason"), BAD)
def test_what_is_no_conversation_says_why(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(Flaw) as raised:
        messages, _ = conversation_of(record, "auto")
        learned_messages(messages)
    assert reason in str(raised.value)


def read(*paths: Path, options: ReadOptions | None = None) -> tuple[list[Any], Counter[str]]:
    options = options or ReadOptions(chat_format="auto")
    skipped: Counter[str] = Counter()
    found: list[Any] = []
    for block in cut_blocks(select_files(paths, None, options, skipped), options, 120):
        for item in read_chats(block, options, skipped):
            line = item.line if isinstance(item, BadRecord) else item.place.line
            found.append((absolute_line(block, line), item))
    return found, skipped


def test_the_same_conversations_in_every_container(tmp_path: Path) -> None:
    """JSON lines, gzip, zstandard and parquet, cut into small blocks: the same messages with the same line numbers."""
    records: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"q {n}"}, ANSWER], "id": f"i{n}"} for n in range(20)
    ]
    records[7]["messages"].append({"role": "assistant", "tool_calls": [CALLED]})
    records[11]["messages"] = [{"role": "user", "content": "alone"}]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "d.parquet", row_group_size=4)
    told = []
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"):
        found, _ = read(tmp_path / name)
        told.append(
            [
                (line, item.id, item.messages, item.learned) if isinstance(item, Conversation) else (line, item.reason)
                for line, item in found
            ]
        )
    assert told[0] == told[1] == told[2] == told[3]
    assert [row[0] for row in told[0]] == list(range(1, 21))
    assert told[0][11] == (12, "no message is the assistant's: there is nothing to learn")


def test_lines_that_are_no_records(tmp_path: Path) -> None:
    good = json.dumps({"prompt": "q", "completion": "a"})
    lines = [good, "", "{", '"x"', '{"prompt": "q", "completion": "\\ud800"}', '{"prompt": 1, "prompt": "q"}', good]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found, skipped = read(tmp_path / "a.jsonl")
    reasons = {line: item.reason for line, item in found if isinstance(item, BadRecord)}
    assert skipped["blank line"] == 1 and set(reasons) == {3, 4, 5, 6}
    assert "not JSON" in reasons[3] and "surrogate" in reasons[5] and "stands 2 times" in reasons[6]


def test_a_json_array_says_how_to_make_lines_of_it(tmp_path: Path) -> None:
    (tmp_path / "alpaca_data.json").write_text(json.dumps([{"instruction": "q", "output": "a"}]))
    (tmp_path / "README.md").write_text("words")
    found, skipped = read(tmp_path)
    assert len(found) == 1 and "jq -c '.[]'" in found[0][1].reason
    assert sum(skipped.values()) == 1
