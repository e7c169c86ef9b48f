"""GPT-NeoX' checkpoints, laid out by hand from their source: weights, logits and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from foreign.laid_by_hand import LLAMA, logits_of, shape_of, weights_of
from foreign.neox_by_hand import neox_config, neox_layers, save_neox
from torch import Tensor

from megatron.config.errors import CheckpointError, ConfigError
from megatron.config.model_shape import ModelShape
from megatron.foreign.checkpoint import foreign_shape, open_foreign

NEOX: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "hidden_act": "gelu_tanh",
    "gated_mlp": False,
    "norm": "layernorm",
    "attention_bias": True,
    "mlp_bias": True,
    "parallel_block": True,
    "partial_rotary_factor": 0.25,
}
LEARNED = {k: v for k, v in NEOX.items() if k != "partial_rotary_factor"} | {
    "parallel_block": False,
    "tie_word_embeddings": True,
    "position_embedding": "learned",
    "max_position_embeddings": 48,
    "hidden_act": "gelu",
}
MODELS = {
    "pythia": NEOX,
    "serial": NEOX | {"parallel_block": False},
    "learned": LEARNED,
    "llama": LLAMA,
    "llama-mha": LLAMA | {"num_key_value_heads": 8},
    "geglu": LLAMA | {"hidden_act": "gelu", "mlp_bias": True, "query_key_value_bias": True},
}


def imported(folder: Path, words: int | None = 90, **more: Any) -> tuple[ModelShape, dict[str, Tensor]]:
    checkpoint = open_foreign(folder, pickles_allowed=True, **more)
    shape = foreign_shape(checkpoint, words)
    return shape, checkpoint.tensors(shape).all()


def lay(folder: Path, shape: ModelShape, tp: int = 1, pipeline: bool = True, **config: Any) -> Path:
    return save_neox(folder, neox_layers(weights_of(shape), shape, tp), neox_config(shape, **config), pipeline)


@pytest.mark.parametrize("model", MODELS)
def test_every_layout_gives_the_same_weights(model: str, tmp_path: Path) -> None:
    shape = shape_of(MODELS[model])
    weights = weights_of(shape)
    for tp, pipeline in ((1, True), (2, True), (4, True), (1, False), (2, False)):
        if shape.parallel_block and tp == 4:
            continue
        found_shape, found = imported(lay(tmp_path / f"{tp}{pipeline}", shape, tp, pipeline))
        assert found_shape == shape and found.keys() == weights.keys()
        for name, tensor in weights.items():
            if shape.parallel_block and tp == 2 and name.endswith(("output.bias", "down.bias")):
                torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)  # a sum
            else:
                assert torch.equal(found[name], tensor), name


def test_three_matrices_of_the_first_llamas(tmp_path: Path) -> None:
    shape = shape_of(LLAMA)
    weights = weights_of(shape)
    layers = neox_layers(weights, shape, 2, split_mlp=True)
    _, found = imported(save_neox(tmp_path, layers, neox_config(shape)))
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def test_logits_are_those_of_transformers(tmp_path: Path) -> None:
    """With names of GPTNeoXForCausalLM written out here; its joint projection is theirs."""
    shape = shape_of(NEOX)
    weights = weights_of(shape)
    layers = neox_layers(weights, shape, 1)
    found_shape, found = imported(save_neox(tmp_path, layers, neox_config(shape)))
    state = {
        "gpt_neox.embed_in.weight": weights["embedding.weight"][:90],
        "lm_head.weight": weights["head.weight"][:90],
    }
    for kind in ("weight", "bias"):
        state[f"gpt_neox.final_layer_norm.{kind}"] = weights[f"final_norm.{kind}"]
    for number in range(shape.num_hidden_layers):
        state |= {f"gpt_neox.layers.{number}.{name}": tensor for name, tensor in layers[number + 2][0].items()}
    state = {
        n.replace("mlp.linear1", "mlp.dense_h_to_4h").replace("mlp.linear2", "mlp.dense_4h_to_h"): t
        for n, t in state.items()
    }
    config = transformers.GPTNeoXConfig(
        vocab_size=90,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_act="gelu_pytorch_tanh",
        max_position_embeddings=48,
        layer_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(state)
    tokens = torch.randint(90, (2, 40))
    with torch.no_grad():
        wanted = model(tokens).logits
    torch.testing.assert_close(logits_of(found_shape, found, tokens), wanted, rtol=1e-4, atol=1e-4)


def test_norms_that_drifted_apart_are_averaged(tmp_path: Path) -> None:
    shape = shape_of(NEOX)
    weights = weights_of(shape)
    layers = neox_layers(weights, shape, 2)
    layers[3][1]["input_layernorm.weight"] = layers[3][1]["input_layernorm.weight"] + 0.5
    _, found = imported(save_neox(tmp_path, layers, neox_config(shape)))
    torch.testing.assert_close(
        found["layers.1.attention_norm.weight"], weights["layers.1.attention_norm.weight"] + 0.25
    )


def test_missing_files_and_tensors(tmp_path: Path) -> None:
    shape = shape_of(NEOX)
    for number, (change, said) in enumerate(
        (
            (
                lambda step: (step / "layer_03-model_01-model_states.pt").unlink(),
                "layer_03-model_01.* is missing, of 2",
            ),
            (
                lambda step: [(step / f"layer_04-model_0{rank}-model_states.pt").unlink() for rank in (0, 1)],
                r"layer 4 lacks attention_norm\.weight",
            ),
            (
                lambda step: torch.save({"norm.weight": torch.ones(3)}, step / "layer_06-model_00-model_states.pt"),
                "rank",
            ),
            (
                lambda step: torch.save({}, step / "layer_00-model_00-model_states.pt"),
                r"layer 0 lacks embedding\.weight",
            ),
            (
                lambda step: [
                    torch.save({"mlp.fc1_weight": torch.ones(3)}, step / f"layer_03-model_0{rank}-model_states.pt")
                    for rank in (0, 1)
                ],
                r"fc1_weight: is none of a plain GPT-NeoX",
            ),
            (lambda step: (step / "layer_02-model_00-model_states.pt").write_bytes(b"PK\x03\x04"), "layer_02-model_00"),
        )
    ):
        folder = lay(tmp_path / str(number), shape, 2)
        change(folder / "global_step7")
        with pytest.raises(CheckpointError, match=said):
            imported(folder)


def test_configs(tmp_path: Path) -> None:
    shape = shape_of(NEOX)
    folder = lay(tmp_path / "a", shape, 2)
    configs = folder / "global_step7" / "configs"
    (configs / "local.yml").write_text("hidden-size: 64\n")
    with pytest.raises(CheckpointError, match=r"model\.yml: hidden_size is 32, and 64 in .*local\.yml"):
        imported(folder)
    (configs / "local.yml").write_text("a: [1\n")
    with pytest.raises(CheckpointError, match=r"local\.yml: not a YAML config"):
        imported(folder)
    (configs / "local.yml").write_text("!!python/object/apply:os.system ['touch canary']\n")
    with pytest.raises(CheckpointError, match=r"local\.yml: not a YAML config"):
        imported(folder)
    moved = tmp_path / "model.yml"
    (configs / "model.yml").rename(moved)
    (configs / "local.yml").unlink()
    with pytest.raises(ConfigError, match="--config"):
        imported(folder)
    assert imported(folder, configs=[moved])[0] == shape
    moved.write_text(moved.read_text().replace('"num_layers": 3', '"num_layers": 4'))
    with pytest.raises(CheckpointError, match="num_layers is 4, and 3 in"):
        imported(folder, configs=[moved])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pos_emb", "alibi"),
        ("activation", "mish"),
        ("norm", "scalenorm"),
        ("gpt_j_tied", True),
        ("use_qk_layernorm", True),
        ("sliding_window_width", 128),
        ("attention_config", [[["global", "sparse_fixed"], 1]]),
        ("soft_prompt_tuning", {"enabled": True}),
        ("te_mha", True),
        ("moe_num_experts", 8),
        ("use_mup", True),
    ],
)
def test_what_the_decoder_cannot_express_is_refused_by_name(key: str, value: Any, tmp_path: Path) -> None:
    folder = lay(tmp_path, shape_of(NEOX), **{key: value})
    with pytest.raises(ConfigError, match=key):
        imported(folder)


def test_which_step(tmp_path: Path) -> None:
    shape = shape_of(NEOX)
    folder = lay(tmp_path, shape)
    assert imported(folder)[0] == imported(folder, iteration=7)[0] == imported(folder / "global_step7")[0] == shape
    with pytest.raises(CheckpointError, match="no step 9: there are steps 7"):
        imported(folder, iteration=9)
    (folder / "latest").write_text("global_step9")
    with pytest.raises(CheckpointError, match=r"latest: names 'global_step9', and there are steps 7"):
        imported(folder)
    (folder / "latest").unlink()
    (folder / "global_step8").mkdir()
    with pytest.raises(ConfigError, match="steps 7, 8 and no file 'latest'"):
        imported(folder)
