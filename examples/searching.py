"""The nearest passages to a question: the largest products of unit vectors."""

import textwrap
from typing import Any

import numpy as np
from rich.console import Console

BEST = 3


def answer(
    screen: Console, texts: list[str], questions: list[str], vectors: np.ndarray[Any, np.dtype[np.float32]]
) -> None:
    """Print the best passages for each question; `vectors` are those of the texts, then those of the questions."""
    manual, asked = vectors[: len(texts)], vectors[len(texts) :]
    for question, vector in zip(questions, asked, strict=True):
        near = manual @ vector
        screen.print(f"\n[bold]{question}[/bold]")
        for best in np.argsort(near)[::-1][:BEST]:
            passage = textwrap.shorten(texts[best], 320, placeholder=" ...")
            lines = textwrap.wrap(passage, 104, initial_indent=f"  {near[best]:.2f}  ", subsequent_indent=" " * 8)
            screen.print("\n".join(lines), markup=False)
