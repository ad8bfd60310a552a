"""Two processes with TensorFlow for all tests of it: it takes seconds to import, and its threads do not survive a fork."""

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from processes import Other

collect_ignore_glob = [] if importlib.util.find_spec("tensorflow") else ["test_tensorflow.py", "test_keras.py"]


@pytest.fixture(scope="session")
def tensorflows() -> Iterator[list[Other]]:
    with ExitStack() as stack:
        others = [stack.enter_context(Other(TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="")) for _ in range(2)]
        for other in others:
            other.start("import_all", "tf_tasks")
        for other in others:
            other.result()
        yield others


@pytest.fixture
def publisher(tensorflows: list[Other]) -> "Asked":
    return Asked(tensorflows[0])


@pytest.fixture
def attacher(tensorflows: list[Other]) -> "Asked":
    return Asked(tensorflows[1])


class Asked:
    """Does what is in `tf_tasks`."""

    def __init__(self, other: Other) -> None:
        self.other = other
        self.pid = other.pid

    def __call__(self, task: str, *args):
        return self.other("call", "tf_tasks", task, *args)
