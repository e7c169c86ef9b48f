"""What an older `transformers` makes of folders: a program of its own, since two versions do not go into one process.

    python read_by_transformers_4.py INSTALLED OUTPUT FOLDER…

INSTALLED: where `pip install --target` put it. Writes logits float32 [len(TOKENS), vocabulary] of each folder to
OUTPUT, by number, and prints the version.
"""

from __future__ import annotations

import json
import sys

TOKENS = [3, 1, 4, 1, 5, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50, 28, 84, 19, 71, 69, 39, 93, 75, 10, 58]

if __name__ == "__main__":
    installed, output, *folders = sys.argv[1:]
    sys.path.insert(0, installed)

    import torch
    import transformers
    from safetensors.torch import save_file

    transformers.logging.set_verbosity_error()
    found, classes = {}, []
    for number, folder in enumerate(folders):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        wrong = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]]
        assert not wrong, (folder, wrong)
        with torch.no_grad():
            found[str(number)] = model.eval()(torch.tensor([TOKENS])).logits[0].contiguous()
        classes.append(type(model).__name__)
    save_file(found, output)
    print(json.dumps({"version": transformers.__version__, "classes": classes}))
