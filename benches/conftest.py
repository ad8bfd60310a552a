"""What is measured elsewhere is played to pytest-benchmark, which keeps the books.

Rows are measured round by round, one peer after the other in each, which pytest-benchmark cannot do by itself: a case's
clock moves by what its rounds took.
"""

from __future__ import annotations

import environment  # noqa: F401 isort: skip (before anything that reads it)

import gc
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ending import end_well

#: Row and case: why it is not there.
CANNOT: list[dict[str, str]] = []


@pytest.fixture(scope="session", autouse=True)
def all_imported() -> Iterator[None]:
    """Here once; every process that is measured is a child of this one."""
    # In a test, SystemExit would be this test's failure.
    end_well(lambda code: pytest.exit(f"told to end by signal {code - 128}", code))
    before = {path.name for path in Path("/dev/shm").iterdir()}
    with tempfile.TemporaryDirectory(prefix="onecopy-peers-") as folder:
        tempfile.tempdir = os.environ["TMPDIR"] = os.environ["BENCH_TMP"] = folder
        logging.disable(logging.WARNING)
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        import torch
        import zerocopy  # noqa: F401

        torch.set_num_threads(1)
        from children import be_still
        from shapes import BERT, MINILM, T5, linears

        for shape in (BERT, MINILM, T5, linears(1)):
            shape.warm_up()
        be_still()
        yield
        import psutil

        gc.collect()
        assert psutil.Process().children(recursive=True) == []
    left = {path.name for path in Path("/dev/shm").iterdir()} - before
    assert [name for name in left if "onecopy-peers-" in name or name.startswith("torch_")] == []


class Clock:
    """Moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def move(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()


@pytest.fixture
def play(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Give a case its seconds, one a round, and what else is known of it."""
    from company import Cannot

    def play(group: str, case: str, seconds: list[float] | Cannot, **facts: Any) -> None:
        if isinstance(seconds, Cannot):
            CANNOT.append({"group": group, "case": case, "reason": seconds.reason})
            pytest.skip(f"{case}: {seconds.reason}")
        benchmark = request.getfixturevalue("benchmark")
        benchmark.group = group
        # The clock starts anew: long runs would cost the small ones their last digits.
        CLOCK.now = 0.0
        benchmark._timer = CLOCK
        benchmark.extra_info.update(case=case, seconds=[round(second, 9) for second in seconds], **facts)
        left = iter(seconds)
        benchmark.pedantic(lambda: CLOCK.move(next(left)), rounds=len(seconds))

    return play


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    from machine import described
    from peers import ALL

    output_json["machine"] = described()
    output_json["cannot"] = CANNOT
    output_json["peers"] = {peer.name: {"version": peer.version(), "settings": peer.settings} for peer in ALL}
