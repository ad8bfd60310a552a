"""Every test has a namespace of its own, and leaves nothing behind in it."""

from __future__ import annotations

import gc
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import leave, within

pytest_plugins = ["cgroups", "leftovers", "plain", "zygote"]


@pytest.fixture
def log(tmp_path: Path) -> str:
    """Where each load of a model leaves a line."""
    return str(tmp_path / "loads")


@pytest.fixture
def namespace(run_name: str) -> Iterator[str]:
    """A namespace of the test's own; afterwards nothing of it may be left but the registry, which is removed."""
    from onecopy import process
    from onecopy.errors import OneCopyError

    name = f"{run_name}-{uuid.uuid4().hex[:12]}"
    yield name
    gc.collect()
    prefix = f"onecopy-v1-{os.geteuid()}-{name}"
    try:
        store = process.core_store(process.Place(name))
        leave(store)
        # Others may be on their way out.
        assert within(20, store.remove_registry_if_unused)
    except OneCopyError:
        pass
    assert [left.name for left in Path("/dev/shm").glob(f"{prefix}*")] == []
