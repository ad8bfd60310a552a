"""Real pipelines: their workers import the handlers that the tests ship from this folder."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (HERE, os.environ.get("PYTHONPATH"))))

collect_ignore_glob = [] if importlib.util.find_spec("apache_beam") else ["test_*.py"]


@pytest.fixture(autouse=True)
def untouched_switch(monkeypatch):
    monkeypatch.delenv("ONECOPY", raising=False)


@pytest.fixture
def namespace(namespace):
    """The namespace of the test; what handlers and Beam keep until the process exits is let go of before it is looked at."""
    yield namespace
    from apache_beam.utils import shared

    from onecopy.beam import loaded

    loaded._kept.clear()
    shared._shared_map._keepalive = (None, None)


@pytest.fixture
def room(tmp_path):
    """Where the processes of a test leave word for each other."""
    return str(tmp_path)
