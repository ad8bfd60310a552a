"""torch's threads, and the count of processes that they share the CPUs with."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from onecopy.beam import threads


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "_told", [])
    yield
    torch.set_num_threads(before)


def test_none_leaves_them_alone():
    torch.set_num_threads(3)
    threads.apply(None)
    assert torch.get_num_threads() == 3


def test_a_number():
    threads.apply(5)
    assert torch.get_num_threads() == 5


def test_auto(monkeypatch):
    monkeypatch.setattr(threads, "cpus", lambda: 8)
    monkeypatch.setattr(threads, "sdk_workers", lambda: 3)
    threads.apply("auto")
    assert torch.get_num_threads() == 2


def test_says_once_that_the_machine_is_oversubscribed(monkeypatch, caplog):
    monkeypatch.setattr(threads, "cpus", lambda: 4)
    monkeypatch.setattr(threads, "sdk_workers", lambda: 3)
    with caplog.at_level(logging.INFO, "onecopy"):
        threads.apply(2)
        assert not caplog.records
        threads.apply(3)
        threads.apply(3)
    (record,) = caplog.records
    assert record.message == (
        "3 SDK worker processes with 3 torch threads each share 4 CPUs; torch_num_threads='auto' would give 1"
    )


def test_cpus_are_within_the_affinity():
    assert 1 <= threads.cpus() <= len(os.sched_getaffinity(0))


def test_sdk_workers_are_seen(monkeypatch):
    # Other pipelines may run on this machine: only the two made here are looked at.
    pretend = "print(flush=True); input()  # from apache_beam.runners.worker.sdk_worker import SdkHarness"
    workers = [
        subprocess.Popen([sys.executable, "-c", pretend], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        for worker in workers:
            worker.stdout.read(1)  # until it runs its command, /proc may still show the one it was forked from
        places = [Path(f"/proc/{process}/cmdline") for process in (os.getpid(), *(worker.pid for worker in workers))]
        monkeypatch.setattr(Path, "glob", lambda *_: iter(places))
        assert threads.sdk_workers() == 2
    finally:
        for worker in workers:
            worker.communicate(b"\n")
    assert threads.sdk_workers() == 1
