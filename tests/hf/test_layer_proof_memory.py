"""Memory of a proof layer by layer, at 200 million parameters: a few layers of it, not the model.

Counted is what belongs to the process alone (RssAnon). transformers maps the files while it loads them; their pages are
the page cache's, which the kernel takes back when it needs them, and are in VmHWM all the same: that is printed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from hf.streamed import python

PROGRAM = """
import sys, threading, time
from pathlib import Path
import torch
import accelerate, transformers.models.llama.modeling_llama
from megatron.hf.architecture import shape_from_folder
from megatron.hf.import_weights import HuggingFaceTensors
from megatron.hf.parity import prove
from megatron.hf.proof_prompts import prompts_from

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

highest = 0
def watch():
    global highest
    while True:
        highest = max(highest, resident("RssAnon"))
        time.sleep(0.002)

folder = Path(sys.argv[1])
shape = shape_from_folder(folder)
before, mapped = resident("RssAnon"), resident("VmHWM")
threading.Thread(target=watch, daemon=True).start()
prompts = prompts_from({"numbers": list(range(1000))}, shape, longest=64)
proof = prove(folder, HuggingFaceTensors(folder, shape), shape, prompts, dtype=torch.bfloat16, extent="layers")
assert proof.passed and len(proof.layers) == 21
print(resident("VmHWM") - mapped)
print(highest - before)
"""


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from Linux' /proc")
def test_a_few_layers_are_in_memory_and_not_the_model(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=20,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=4000,
        max_position_embeddings=512,
    )
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config).bfloat16()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert 200e6 < parameters < 260e6
    model.save_pretrained(tmp_path / "model", max_shard_size="100MB")
    del model
    done = python(PROGRAM, tmp_path / "model", limit=280)
    assert done.returncode == 0, done.stderr
    with_files, highest = map(int, done.stdout.splitlines()[-2:])
    print(
        f"{highest / 1e6:.0f} MB, {with_files / 1e6:.0f} MB with mapped files; a layer is {4 * layer / 1e6:.0f} MB, "
        f"the model twice {8 * parameters / 1e6:.0f} MB"
    )
    outside = 2 * 4 * (parameters - 20 * layer)
    assert highest < outside + 4 * 4 * layer + 500 * 10**6 < 4 * parameters
