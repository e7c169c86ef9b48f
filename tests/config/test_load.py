"""The config file: read exactly, written back equal, wrong keys named with their place and the nearest right one."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest

from megatron.config.errors import ConfigError
from megatron.config.load import config_to_tables, config_to_toml, json_schema, load_config
from megatron.config.quantities import Quantity, format_count, parse_count, parse_quantity

TEXT = """\
[run]
name = "r"
output = "out"

[tokenizer]
path = "bytes"

[model]
preset = "llama-1b"
seq_length = 64

[sources.python]
group = "code"
data = ["p"]

[sources.web]
tokens = "5B"

[train]
global_batch_size = 8

[[stages]]
name = "one"
tokens = "1M"
mixture = { code = 0.1, web = 0.9 }
lr = { peak = 3e-4, warmup = "500 steps" }

[[stages]]
name = "two"
steps = 10
mixture = { web = 1 }
"""


UNITS = {
    "stages.two.steps=30 tokens": "or say tokens = 30 instead",
    "stages.one.tokens=1.5K steps": "or say steps = 1500 instead",
    "stages.one.tokens=30 samples": "or say samples = 30 instead",
    "stages.one.tokens=10%": "or say share = 0.1 instead",
    "train.tokens=30 steps": "a count of tokens, and '30 steps' counts steps",
    "sources.web.tokens=30 steps": "a count of tokens, and '30 steps' counts steps",
    "stages.one.mixture_tokens={web='3 steps'}": "a count of tokens, and '3 steps' counts steps",
}


@pytest.mark.parametrize("override", UNITS)
def test_B1_a_count_in_another_unit_is_refused_by_name(file: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=UNITS[override]):
        load_config(file, [override])
    config = load_config(file, ["stages.two.steps=30 steps", "stages.one.tokens=1K tokens"])
    assert (config.stages[1].steps, config.stages[0].tokens) == (30, 1000)


def test_B1_a_quoted_name_of_a_table_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(TEXT + '\n[sources."../a.b"]\ntokens = "3B"\nslices = 1\n')
    line = path.read_text().splitlines().index("slices = 1") + 1
    with pytest.raises(ConfigError, match=rf"run\.toml:{line}: unknown key"):
        load_config(path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(TEXT)
    return path


def test_weights_are_exact_decimals(file: Path) -> None:
    config = load_config(file)
    assert config.stages[0].mixture == {"code": Decimal("0.1"), "web": Decimal("0.9")}
    assert load_config(file, ["stages.two.mixture={web=0.30, code=0.1}"]).stages[1].mixture == {
        "web": Decimal("0.30"),
        "code": Decimal("0.1"),
    }


def test_the_resolved_config_reads_back_equal(file: Path, tmp_path: Path) -> None:
    config = load_config(file)
    again = tmp_path / "again.toml"
    again.write_text(config_to_toml(config))
    assert load_config(again) == config
    assert json.loads(json.dumps(config_to_tables(config)))["train"]["global_batch_size"] == 8


def test_overrides_reach_tables_lists_and_names(file: Path) -> None:
    config = load_config(
        file, ["train.micro_batch_size=4", "stages.two.steps=7", "stages.0.name=uno", "run.name=other"]
    )
    assert (config.train.micro_batch_size, config.stages[1].steps) == (4, 7)
    assert (config.stages[0].name, config.run.name) == ("uno", "other")


def test_the_schema_describes_every_table() -> None:
    schema = json_schema()
    assert {"run", "sources", "stages", "train", "parallel"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "global_batch_size",
            "global_bach_size",
            r"run.toml:20: unknown key train.global_bach_size: .*'global_batch_size'",
        ),
        ("steps = 10", "stepz = 10", r"run.toml:30: unknown key stages.two.stepz: did you mean 'steps'"),
        ("web = 0.9", "web = -0.9", r"run.toml:25: stages.one.mixture.web = -0.9: .*greater than or equal to 0"),
        ('tokens = "5B"', 'tokens = "5X"', r'run.toml:17: sources.web.tokens = "5X": .* is not a quantity'),
        ('tokens = "5B"', "", "sources.web: needs data"),
        ('name = "two"', 'name = "one"', "'one' is used twice"),
        ("seq_length = 64", "", "model.seq_length is missing"),
        ("[run]", "[run", "not valid TOML"),
    ],
)
def test_B1_a_wrong_key_is_named_with_its_line_and_remedy(file: Path, old: str, new: str, words: str) -> None:
    file.write_text(TEXT.replace(old, new, 1))
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(file)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.micro_bach_size=4", "--set train.micro_bach_size=4: unknown key train.micro_bach_size"),
        ("stages.two.mixture={web=-1}", r"--set stages.two.mixture=\{web=-1\}: stages.two.mixture.web = -1"),
        ("train.micro_batch_size", "write KEY=VALUE"),
        ("stages.three.steps=1", "no entry 'three'; there are one, two"),
        ("run.name.x=1", "nothing lies below|is a value"),
    ],
)
def test_B1_a_wrong_override_is_named(file: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(file, [override])


def test_B1_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing.toml: no such config file"):
        load_config(tmp_path / "nothing.toml")


def test_quantities() -> None:
    assert parse_count("1.5K") == 1500 and parse_count("2T") == 2 * 10**12 and parse_count(7) == 7
    assert parse_count("1_000") == 1000
    assert parse_quantity("500 steps") == Quantity(Decimal(500), "steps")
    assert parse_quantity("2%") == Quantity(Decimal("0.02"), "share")
    for wrong in ("5X", "-3", "", "1.5", True, None, 1.5):
        with pytest.raises(ValueError, match=r"quantity|whole|negative"):
            parse_count(wrong)
    assert parse_count("2K steps", "steps") == 2000 and parse_count("7 samples", "samples") == 7
    for wrong in ("30 steps", "30 samples", "10%", "2K steps"):
        with pytest.raises(ValueError, match='this is a count of tokens, and .* write a whole number, or one as "100K'):
            parse_count(wrong, "tokens")
    with pytest.raises(ValueError, match="'30 tokens' counts tokens"):
        parse_count("30 tokens")
    with pytest.raises(ValueError, match="500 steps"):
        parse_quantity("30 foo")
    with pytest.raises(ValueError, match='^(?!.*500 steps).*"100K tokens"'):
        parse_count("30 foo", "tokens")
    assert [format_count(n) for n in (0, 999, 1234, 5 * 10**9)] == ["0", "999", "1.23K", "5B"]
