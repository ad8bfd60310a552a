"""T5 with seeded weights; every inference generates so many tokens."""

from __future__ import annotations

import shapes
import torch
from apache_beam.ml.inference.pytorch_inference import make_tensor_model_fn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.modeling_utils import no_init_weights

from nets.torch_model import Model, seeded

TOKENS, NEW = 32, 8
SIZES = {
    "t5-large": {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
    "t5-base": {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    "t5-small": {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
}


def built(**sizes: int) -> T5ForConditionalGeneration:
    """As a user's class that loads weights: without random numbers that are overwritten, which would cost each load seconds."""
    with no_init_weights():
        model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    model.tie_weights()
    return model


def examples(count: int) -> list[torch.Tensor]:
    return list(torch.randint(1, 32000, (max(64, count), TOKENS), generator=seeded()))


def find(name: str) -> Model:
    def filled() -> torch.nn.Module:
        model = built(**SIZES[name])
        shapes.fill(model)
        return model

    generate = {"inference_fn": make_tensor_model_fn("generate")}
    tokens = {"min_new_tokens": NEW, "max_new_tokens": NEW, "do_sample": False}
    return Model(name, built, filled, examples, SIZES[name], tokens, generate)
