"""Generation against a plain loop of whole forward passes; rows alone and together; many ranks against one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models.tensor_cases import LENGTH, SHAPES
from ranks import run_ranks

from megatron.checkpoint.tensor_shards import WholeTensors
from megatron.config.errors import CheckpointError
from megatron.config.layout import Layout
from megatron.config.model_shape import ModelShape
from megatron.generation.generate import Answer, Prompt, generate
from megatron.generation.rank_decoder import RankDecoder
from megatron.generation.sampling import SamplingRules, choose, uniform
from megatron.models.decoder import Decoder
from megatron.models.initialise import initialise
from megatron.parallel.mesh import close_mesh, launched, one_process_mesh, open_mesh

NAMES = ("two key heads, tied", "neox", "gpt2", "olmo2", "every other layer with a window")
PROMPTS = ([5, 9, 13, 2, 7], [3], [11, 4, 4, 8, 1, 0, 6, 6, 2])
RULES = SamplingRules(temperature=1.3, top_k=40, top_p=0.95, repetition_penalty=1.2)
CPU = torch.device("cpu")


def weights_of(shape: ModelShape) -> dict[str, torch.Tensor]:
    model = Decoder(shape).double()
    initialise(model, 5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)  # so that the likeliest tokens are not all alike
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def answers_of(shape: ModelShape, mesh: Any, prompts: Any = PROMPTS, **more: Any) -> list[Answer]:
    decoder = RankDecoder(shape, WholeTensors(weights_of(shape)), mesh, torch.float64)
    rows = [Prompt(str(number), tokens) for number, tokens in enumerate(prompts)]
    options = {"max_new_tokens": 12, "ending": frozenset({17}), "seed": 4} | more
    return generate(decoder, rows, options.pop("rules", RULES), **options)[0]


def plain(shape: ModelShape, key: str, tokens: list[int], rules: SamplingRules = RULES) -> Answer:
    """One row, each token by a whole forward pass of everything before it."""
    model, answer = Decoder(shape).double().eval(), Answer()
    model.load_state_dict(weights_of(shape))
    while len(answer.tokens) < 12 and len(tokens) + len(answer.tokens) < shape.max_position_embeddings:
        row = torch.tensor([[*tokens, *answer.tokens]])
        with torch.no_grad():
            logits = model.logits(row, torch.zeros_like(row))[:, -1, : shape.vocab_size]
        chance = uniform(4, key, len(answer.tokens))
        token, log_probability = choose(logits, rules, [chance], [row[0].tolist()])
        answer.log_probability += float(log_probability)
        if int(token) == 17:
            answer.end = "end"
            break
        answer.tokens.append(int(token))
    return answer


def same(found: list[Answer], wanted: list[Answer]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert (a.tokens, a.end) == (b.tokens, b.end)
        assert math.isclose(a.log_probability, b.log_probability, rel_tol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_whole_passes(name: str) -> None:
    found = answers_of(SHAPES[name], one_process_mesh(CPU))
    wanted = [plain(SHAPES[name], str(number), tokens) for number, tokens in enumerate(PROMPTS)]
    same(found, wanted)
    assert len({tuple(answer.tokens) for answer in found}) == len(PROMPTS)


def test_greedy_answers_take_no_chance() -> None:
    shape, greedy = SHAPES[NAMES[0]], SamplingRules(temperature=0)
    mesh = one_process_mesh(CPU)
    found = [answers_of(shape, mesh, rules=greedy, seed=seed) for seed in (4, 5)]
    same(found[0], found[1])
    same(found[0], [plain(shape, str(number), tokens, greedy) for number, tokens in enumerate(PROMPTS)])


def test_an_answer_does_not_know_of_the_rows_beside_it() -> None:
    shape, mesh = SHAPES["neox"], one_process_mesh(CPU)
    together = answers_of(shape, mesh)
    decoder = RankDecoder(shape, WholeTensors(weights_of(shape)), mesh, torch.float64)
    for number, tokens in enumerate(PROMPTS):
        alone, pace = generate(
            decoder, [Prompt(str(number), tokens)], RULES, max_new_tokens=12, ending=frozenset({17}), seed=4
        )
        same(alone, [together[number]])
        assert pace.prompt_tokens == len(tokens) and pace.new_tokens == len(alone[0].tokens) + (alone[0].end == "end")


def test_a_row_ends_where_it_is_told_and_where_positions_end() -> None:
    shape, mesh = SHAPES["neox"], one_process_mesh(CPU)
    whole = answers_of(shape, mesh, ending=frozenset())
    ended = answers_of(shape, mesh, ending=frozenset({whole[1].tokens[4]}))
    assert ended[1].end == "end" and ended[1].tokens == whole[1].tokens[: whole[1].tokens.index(whole[1].tokens[4])]
    stopped = answers_of(shape, mesh, ending=frozenset(), is_done=lambda tokens: len(tokens) == 3)
    assert [answer.end for answer in stopped] == ["stop"] * 3 and stopped[2].tokens == whole[2].tokens[:3]
    long = answers_of(shape, mesh, ([1] * (LENGTH - 2), [1]), ending=frozenset())
    assert [(len(answer.tokens), answer.end) for answer in long] == [(2, "length"), (12, "length")]
    with pytest.raises(ValueError, match="1 to"):
        answers_of(shape, mesh, ([1] * LENGTH,))


def test_weights_of_another_model_are_refused() -> None:
    shape, weights = SHAPES["neox"], weights_of(SHAPES["neox"])
    mesh = one_process_mesh(CPU)
    with pytest.raises(CheckpointError, match="final_norm.bias"):
        short = {name: tensor for name, tensor in weights.items() if name != "final_norm.bias"}
        RankDecoder(shape, WholeTensors(short), mesh, torch.float32)
    with pytest.raises(CheckpointError, match=r"final_norm.bias is \[7\]"):
        RankDecoder(shape, WholeTensors(weights | {"final_norm.bias": torch.zeros(7)}), mesh, torch.float32)
    broken = WholeTensors(weights | {"final_norm.bias": torch.full_like(weights["final_norm.bias"], math.nan)})
    decoder = RankDecoder(shape, broken, mesh, torch.float32)
    with pytest.raises(CheckpointError, match="not finite"):
        generate(decoder, [Prompt("0", [1])], RULES, max_new_tokens=1, ending=frozenset())


def on_rank(layout: Layout) -> list[list[Answer]]:
    """Body of a rank: the answers of every shape."""
    mesh = open_mesh(layout, launched(), 60)
    found = [answers_of(SHAPES[name], mesh) for name in NAMES]
    close_mesh()
    return found


@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(pipeline=2), Layout(tensor=2, pipeline=2)], ids=str)
def test_every_rank_of_a_layout_has_the_answers_of_one_process(layout: Layout) -> None:
    wanted = [answers_of(SHAPES[name], one_process_mesh(CPU)) for name in NAMES]
    for rank in run_ranks(layout.world_size, on_rank, layout):
        for found, one in zip(rank, wanted, strict=True):
            same(found, one)
