"""Exported folders for other readers than the `transformers` at hand: its version 4, and vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf.family_cases import CASES, made
from hf.read_by_transformers_4 import TOKENS
from hf.test_families import exported
from safetensors.torch import load_file

from megatron.hf.architecture import FAMILIES

TRANSFORMERS_4 = "STAGEMIX_TRANSFORMERS_4"
VLLM = {
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GPTNeoXForCausalLM",
    "GPT2LMHeadModel", "Olmo2ForCausalLM", "Olmo3ForCausalLM", "Phi3ForCausalLM", "GemmaForCausalLM",
    "Gemma2ForCausalLM", "Gemma3ForCausalLM", "CohereForCausalLM",
}  # fmt: skip
"""Those of our families that vllm/model_executor/models/registry.py of vllm 0.33.0 has (GPTNeoX, Olmo2 and Olmo3 by
way of transformers, the others in classes of its own), and so has that of github.com/vllm-project/vllm at commit
0002bff0b6cb36a3c8a17364de3303664463c412."""


def test_every_architecture_is_in_the_registry_of_vllm() -> None:
    assert {family.name for family in FAMILIES} == VLLM


@pytest.mark.soak
def test_C3_transformers_4_computes_the_same_logits(tmp_path: Path) -> None:
    """Every family, read and written by us: as the installed version 5 has it, and as 4 has it."""
    installed = os.environ.get(TRANSFORMERS_4)
    if not installed:
        pytest.skip(
            f"{TRANSFORMERS_4} names no folder made by: pip install --no-deps --target FOLDER 'transformers==4.57.*' "
            "'huggingface_hub<1' 'tokenizers<=0.23'"
        )
    wanted, folders, classes = [], [], []
    for number, case in enumerate(CASES.values()):
        model = made(case, tmp_path / f"made-{number}")
        exported(tmp_path / f"made-{number}", tmp_path / f"ours-{number}")
        with torch.no_grad():
            wanted.append(model(torch.tensor([TOKENS])).logits[0])
        folders.append(str(tmp_path / f"ours-{number}"))
        classes.append(type(model).__name__)
    program = Path(__file__).with_name("read_by_transformers_4.py")
    command = [sys.executable, str(program), installed, str(tmp_path / "logits"), *folders]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["version"].startswith("4.") and said["classes"] == classes
    logits = load_file(tmp_path / "logits")
    for number, name in enumerate(CASES):
        assert float((logits[str(number)] - wanted[number]).abs().max()) <= 1e-4, name
