"""What must be true after the whole run: no process of ours, nothing in /dev/shm but the registry, no temporary file.

A pytest plugin (tests/conftest.py names it). Every process that the tests start inherits a mark in its environment, by which
it is found again, whoever its parent is by then.
"""

import gc
import os
import re
import shutil
import signal
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

MARK = "ONECOPY_TEST_RUN"
SHM = Path("/dev/shm")
# Ends with us: one process of the standard library for all of multiprocessing.
ENDS_WITH_US = "multiprocessing.resource_tracker"
# Left by others: pytest's own folders, torch's compiler, TensorFlow's (compiled files of what autograph writes), and Beam
# (staging folders of its job service; the address files of MultiProcessShared).
NOT_OURS = re.compile(r"pytest|torchinductor_.*|__pycache__|beam-requirements-cache|tmp\w{8}|.*\.(address|lock)")
# Seconds that processes which were told to end get for it; nothing is measured by it.
TO_END = 30


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    os.environ[MARK] = uuid.uuid4().hex
    # A shell starts what it runs in the background with Ctrl-C ignored, which every child would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tempfile.tempdir = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="onecopy-")
    # Short: the sockets that multiprocessing puts below it may have 107 characters.
    config.option.basetemp = config.option.basetemp or str(Path(tempfile.tempdir) / "pytest")


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def run_name() -> str:
    """With which the namespaces of this run begin."""
    return _run_name()


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = _names(SHM)
    yield
    gc.collect()
    _, alive = psutil.wait_procs(_marked(os.environ[MARK]), timeout=TO_END)
    assert [(process.pid, process.cmdline()) for process in alive] == []
    assert sorted(filter(_is_leftover, _names(SHM) - before)) == []
    assert [name for name in _names(Path(tempfile.gettempdir())) if not NOT_OURS.fullmatch(name)] == []


def _run_name() -> str:
    return f"test-{os.environ[MARK][:8]}"


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get(MARK) == mark and ENDS_WITH_US not in " ".join(process.cmdline())
        except psutil.Error:  # gone meanwhile, or somebody else's
            continue
        if ours and process.pid != os.getpid():
            found.append(process)
    return found


def _is_leftover(name: str) -> bool:
    """In a namespace of this run, or a segment in the default one. Whose the others are, nobody here can know."""
    return re.fullmatch(rf"onecopy-v\d+-{os.geteuid()}-({_run_name()}.*|default-.+)", name) is not None
