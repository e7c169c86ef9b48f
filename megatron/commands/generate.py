"""`stagemix generate`: what a model goes on to say, from a checkpoint or a Hugging Face folder."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.config.errors import EXIT_DONE, ConfigError, DataError
from megatron.launch.torchrun import may_be_one_of_several
from megatron.tokenizers.base import first_surrogate

EXAMPLE = """examples:
  stagemix generate --model runs/demo --prompt 'def moving_average(values, width):'
      the newest whole checkpoint of a run; also a checkpoint's or a Hugging Face folder
  stagemix generate --model exports/demo --prompt 'The committee' --greedy --max-new-tokens 40
  stagemix generate --model runs/demo --prompts prompts.jsonl --samples 8 --temperature 0.8 --top-p 0.95 --jsonl
      one JSON object an answer: prompt, sample, text, tokens, log_probability, end, dtype
  torchrun --nproc-per-node 4 tools/generate.py --model runs/large --tensor 2 --pipeline 2 --prompt 'The'
      a model that is too large for one process

A model only goes on from what it is given, as it does in training. An answer ends at the end-of-document token, at a
--stop text, after --max-new-tokens, or where the model's positions end. In one --dtype the same seed gives the same
answer to a prompt, whatever stands beside it, but for ties within rounding.

exit codes: 0 done, 2 wrong options, 3 no tokenizer or no prompts, 4 damaged checkpoint, 6 not available here"""


@dataclass(frozen=True)
class Model:
    """What answers are made with."""

    shape: Any
    weights: Any
    tokenizer: Any
    name: str
    ending: frozenset[int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--model", type=Path, required=True, metavar="PATH", help="checkpoint, run or exported folder")
    parser.add_argument("--prompt", dest="prompts", action="append", default=[], metavar="TEXT", help="may be repeated")
    parser.add_argument(
        "--prompts",
        dest="file",
        metavar="FILE",
        help='.jsonl with {"prompt": …} in each line, else a prompt in each line but blank ones; - for standard input',
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="answers to each prompt (default: 1)")
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token: --temperature 0")
    parser.add_argument("--temperature", type=float, default=0.8, help="of the logits (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens (0: all)")
    parser.add_argument(
        "--top-p", type=float, default=0.95, metavar="P", help="nucleus sampling (default: %(default)s)"
    )
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P", help="at least P x the likeliest token's")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="(default: 1, none)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; may be repeated")
    parser.add_argument(
        "--begin-with", metavar="NAME", help="a special token before each prompt, such as '<|begin_of_text|>'"
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="instead of the model's own")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="answers at a time (default: 8)")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: the quicker")
    parser.add_argument("--tensor", type=int, metavar="N", help="ranks that share each layer (default: all there are)")
    parser.add_argument("--pipeline", type=int, default=1, metavar="N", help="ranks that share the layers out")
    parser.add_argument("--jsonl", action="store_true", help="one JSON object an answer on standard output")


def main(argv: list[str] | None = None) -> int:
    """Runs the command and gives its exit code."""
    parser = argparse.ArgumentParser(
        prog="stagemix generate",
        description="Shows what a model says: its continuations of prompts, with a key-value cache.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    if not may_be_one_of_several():
        return _run(args, None)
    # torch takes seconds to load: a mistake on the command line should not wait for it.
    from megatron.config.schema import HealthSection
    from megatron.parallel.mesh import launched
    from megatron.trainer.job import Rank

    who = launched()
    if who.world_size == 1:
        return _run(args, None)
    rank = Rank(who, HealthSection())
    try:
        rank.meet()
        code = _run(args, rank)
        rank.close()
    except BaseException as error:
        rank.fail(error)
    return code


def _run(args: argparse.Namespace, rank: Any) -> int:
    from megatron.evaluation.precision import choose_dtype
    from megatron.generation.generate import Prompt
    from megatron.generation.rank_decoder import RankDecoder
    from megatron.generation.sampling import SamplingRules

    rules = SamplingRules(
        0.0 if args.greedy else args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty
    )
    _check(args)
    mesh = _mesh(args, rank)
    speaks = rank is None or rank.writes
    texts = rank.share("prompts", lambda: list(_prompts(args))) if rank else list(_prompts(args))
    model = open_model(args.model, args.tokenizer)
    before = _before(args.begin_with, model.tokenizer)
    prompts = [_encoded(text, number, before, model) for number, text in enumerate(texts, 1)]
    dtype, reason = _shared(rank, "dtype", lambda: list(choose_dtype(args.dtype, mesh.device.type)))
    decoder = RankDecoder(model.shape, model.weights, mesh, _torch_dtype(dtype))
    if speaks:
        where = "" if rank is None else f", tensor {mesh.layout.tensor} x pipeline {mesh.layout.pipeline}"
        print(f"{model.name}: {dtype} ({reason}){where}; {_words_of(rules, args.seed)}", file=sys.stderr, flush=True)
        _say_limit(prompts, args.max_new_tokens, model.shape.max_position_embeddings)
    show = _Show(args, texts, model.tokenizer, dtype) if speaks else _Silent()
    work = [
        (number, sample, Prompt(f"{number}/{sample}", tokens))
        for number, tokens in enumerate(prompts)
        for sample in range(args.samples)
    ]
    for begin in range(0, len(work), args.batch_size):
        _batch(args, work[begin : begin + args.batch_size], decoder, rules, model, show)
    return EXIT_DONE


def _batch(
    args: argparse.Namespace, work: Sequence[Any], decoder: Any, rules: Any, model: Model, show: _Show | _Silent
) -> None:
    from megatron.generation.generate import generate

    def is_done(tokens: Sequence[int]) -> bool:
        return bool(args.stop) and _cut(model.tokenizer.decode(tokens), args.stop)[1]

    answers, pace = generate(
        decoder,
        [prompt for _, _, prompt in work],
        rules,
        max_new_tokens=args.max_new_tokens,
        ending=model.ending,
        seed=args.seed,
        is_done=is_done,
        on_token=lambda row, tokens: show.grows(work[row][0], tokens),
    )
    for (number, sample, _), answer in zip(work, answers, strict=True):
        show.answer(number, sample, answer)
    show.pace(pace)


def open_model(path: Path, tokenizer: str | None = None) -> Model:
    """A checkpoint, a run's newest, or a Hugging Face folder. Raises ConfigError, DataError, CheckpointError."""
    from megatron.hf.architecture import shape_from_folder
    from megatron.hf.checkpoint_source import is_checkpoint, open_source
    from megatron.hf.import_weights import HuggingFaceTensors
    from megatron.tokenizers.load import load_tokenizer

    if not path.is_dir():
        raise ConfigError(f"--model {path}: no such folder")
    if is_checkpoint(path) or not (path / "config.json").is_file():
        source = open_source(path, tokenizer)
        if source.tokenizer is None:
            raise DataError(f"--model {path}: this imported checkpoint has no tokenizer: name one with --tokenizer")
        found, shape, weights, name = source.tokenizer, source.shape, source.weights.source, source.name
        ending: set[int] = set()
    else:
        shape = shape_from_folder(path)
        files = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
        if not files and not tokenizer:
            raise DataError(f"--model {path}: neither tokenizer.json nor tokenizer.model: name one with --tokenizer")
        found, weights, name = load_tokenizer(tokenizer or files[0]), HuggingFaceTensors(path, shape), path.name
        ending = _ending(path)
    return Model(shape, weights, found, name, frozenset(ending | {found.eod_id}))


def _ending(folder: Path) -> set[int]:
    """The tokens that end an answer, as the folder says."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            said = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
            ids |= {int(one) for one in (said if isinstance(said, list) else [said]) if isinstance(one, int)}
    return ids


def _check(args: argparse.Namespace) -> None:
    for name in ("max_new_tokens", "samples", "batch_size", "pipeline"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)}: it must be at least 1")
    if "" in args.stop:
        raise ConfigError("--stop '': an empty text ends every answer before its first token")


def _mesh(args: argparse.Namespace, rank: Any) -> Any:
    from megatron.config.layout import Layout
    from megatron.parallel.mesh import one_process_mesh

    world = 1 if rank is None else rank.who.world_size
    tensor = world // args.pipeline if args.tensor is None else args.tensor
    if tensor < 1 or tensor * args.pipeline != world:
        raise ConfigError(
            f"--tensor {tensor} x --pipeline {args.pipeline} are {tensor * args.pipeline} ranks, and {world} were "
            f"started: start as many, torchrun --nproc-per-node {max(1, tensor) * args.pipeline} tools/generate.py …"
        )
    return one_process_mesh() if rank is None else rank.open_mesh(Layout(tensor=tensor, pipeline=args.pipeline))


def _prompts(args: argparse.Namespace) -> Iterator[str]:
    if not args.prompts and args.file is None:
        raise ConfigError("no prompt: say --prompt TEXT, or --prompts FILE")
    for number, text in enumerate(args.prompts, 1):
        if not text:
            raise ConfigError(f"prompt {number} is empty: a model goes on from a text: give at least a character")
        if first_surrogate(text) is not None:
            raise ConfigError(
                f"prompt {number} is not UTF-8 on the command line: write it to a UTF-8 file, for --prompts"
            )
        yield text
    if args.file is not None:
        yield from _from_file(args.file)


def _from_file(name: str) -> Iterator[str]:
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        lines = data.decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts {name}: cannot be read: {error}") from None
    if not any(line.strip() for line in lines):
        raise DataError(f"--prompts {name}: holds no prompt: give one a line")
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _from_line(line, f"{name}, line {number}") if name.endswith(".jsonl") else line.removesuffix("\r")


def _from_line(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}): correct the line") from None
    text = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text or first_surrogate(text) is not None:
        raise DataError(
            f'{where}: {{"prompt": TEXT}} is needed, with a text of at least a character; it is {line[:80]}'
        )
    return text


def _before(name: str | None, tokenizer: Any) -> list[int]:
    if name is None:
        return []
    if name not in tokenizer.special_ids:
        known = ", ".join(sorted(tokenizer.special_ids)) or "none"
        raise ConfigError(f"--begin-with {name}: not a special token of {tokenizer.name}; there are {known}")
    return [int(tokenizer.special_ids[name])]


def _encoded(text: str, number: int, before: list[int], model: Model) -> list[int]:
    tokens = [*before, *model.tokenizer.encode(text)]
    limit = model.shape.max_position_embeddings
    if len(tokens) == len(before):
        raise ConfigError(f"prompt {number} gives no token: a model goes on from a text")
    if len(tokens) >= limit:
        raise ConfigError(
            f"prompt {number} has {len(tokens)} tokens, and the model has {limit} positions: give at most {limit - 1}"
        )
    return tokens


def _say_limit(prompts: Sequence[Sequence[int]], wanted: int, limit: int) -> None:
    """Where the model's positions end before --max-new-tokens."""
    if (room := limit - max(map(len, prompts))) < wanted:
        print(
            f"note: the model has {limit} positions: behind the longest prompt there is room for {room} new tokens, "
            f"not for --max-new-tokens {wanted}",
            file=sys.stderr,
        )


def _shared(rank: Any, name: str, make: Callable[[], Any]) -> Any:
    return make() if rank is None else rank.share(name, make)


def _torch_dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


def _words_of(rules: Any, seed: int) -> str:
    if rules.greedy:
        return "the likeliest token each time"
    named = (("top-k", rules.top_k, 0), ("top-p", rules.top_p, 1), ("min-p", rules.min_p, 0))
    more = "".join(f", {name} {value}" for name, value, none in named if value != none)
    return f"temperature {rules.temperature}{more}, seed {seed}"


def _cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text up to the first of the stops, and whether there is one."""
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(found)], True) if found else (text, False)


class _Show:
    """Standard output: answers as they are done, or, where there is one alone on a terminal, as it grows."""

    def __init__(self, args: argparse.Namespace, texts: Sequence[str], tokenizer: Any, dtype: str) -> None:
        self._args, self._texts, self._tokenizer, self._dtype = args, texts, tokenizer, dtype
        alone = len(texts) * args.samples == 1
        self._live = alone and not args.jsonl and not args.stop and sys.stdout.isatty()
        self._shown = 0
        if self._live:
            print(texts[0], end="", flush=True)

    def grows(self, number: int, tokens: Sequence[int]) -> None:
        """Shows what is new, but for a character whose bytes are not all there."""
        if self._live:
            text = self._tokenizer.decode(tokens).rstrip("\ufffd")
            print(text[self._shown :], end="", flush=True)
            self._shown = max(self._shown, len(text))

    def answer(self, number: int, sample: int, answer: Any) -> None:
        """Shows a whole answer."""
        text, _ = _cut(self._tokenizer.decode(answer.tokens), self._args.stop)
        if self._live:
            print(text[self._shown :], flush=True)
        elif self._args.jsonl:
            row = {"prompt": self._texts[number], "sample": sample, "text": text, "tokens": answer.tokens}
            row |= {"log_probability": answer.log_probability, "end": answer.end, "dtype": self._dtype}
            print(json.dumps(row, ensure_ascii=False), flush=True)
        else:
            which = f", sample {sample + 1}" if self._args.samples > 1 else ""
            ended = {"end": "end of document", "stop": "stop text", "length": "cut"}[answer.end]
            print(f"── prompt {number + 1}{which}: {len(answer.tokens)} tokens, {ended}")
            print(self._texts[number] + text, flush=True)

    def pace(self, pace: Any) -> None:
        """How quick a batch was, on standard error."""
        print(
            f"{pace.prompt_tokens} prompt tokens in {pace.prompt_seconds:.2f} s, {pace.new_tokens} new ones in "
            f"{pace.new_seconds:.2f} s ({pace.new_tokens / max(pace.new_seconds, 1e-9):.1f} tokens/s), "
            f"key-value cache {pace.cache / 1e6:.1f} MB",
            file=sys.stderr,
            flush=True,
        )


class _Silent:
    """A rank that does not speak."""

    def grows(self, number: int, tokens: Sequence[int]) -> None:
        """Nothing."""

    def answer(self, number: int, sample: int, answer: Any) -> None:
        """Nothing."""

    def pace(self, pace: Any) -> None:
        """Nothing."""
