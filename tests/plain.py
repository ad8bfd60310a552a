"""A pytest plugin: processes that have imported no framework, forked from one of them, for tests of the machine around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from processes import Forked, Other


@pytest.fixture(scope="session")
def plain() -> Iterator[Other]:
    """Forks the processes of these tests; it has imported what another user may not read."""
    with Other() as other:
        other("import_all", "told", "surroundings", "email.parser", "encodings.ascii", "onecopy._verbs", "onecopy.cli")
        other("call", "onecopy._key", "compatibility")
        yield other


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """For sockets and a log, open to any user."""
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o711)
    made = tmp_path / "open"
    made.mkdir()
    made.chmod(0o777)
    (made / "log").touch()
    (made / "log").chmod(0o666)
    return made


@pytest.fixture
def born(plain: Other, folder: Path) -> Iterator[Callable[..., Forked]]:
    """Another process: `born()`, or the child of another one, `born(parent)`."""
    with ExitStack() as stack:
        yield lambda parent=plain: stack.enter_context(Forked(parent, folder))


@pytest.fixture
def open_log(folder: Path) -> str:
    """As `log`, where another user may write."""
    return str(folder / "log")
