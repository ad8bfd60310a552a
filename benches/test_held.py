"""Row 3: asking for what this process has."""

import functools
import time
from timeit import Timer

import pytest
from children import Child
from company import room
from peers.ours import store
from rounds import ROUNDS
from shapes import MINILM

import onecopy

CALLS = 20_000


def asking(folder):
    """Plays in a child."""
    from apache_beam.utils.shared import Shared

    model = MINILM.model()
    shared = Shared()
    shared.acquire(lambda: model)
    holder = onecopy.Holder(lambda: model, "model", store=store(folder))
    holder.acquire()
    other = onecopy.Holder(lambda: model, "model", store=store(folder))
    assert other.acquire() is holder.acquire()
    other.release()

    def another():
        other.acquire()
        other.release()

    table = {"model": model}
    arms = {
        "Holder.acquire, held": holder.acquire,
        "another Holder's acquire and release": another,
        "Beam Shared.acquire": lambda: shared.acquire(None),
        "a dictionary": lambda: table["model"],
    }
    yield None
    spent = {name: [] for name in arms}
    for _ in range(ROUNDS * 2):
        for name, work in arms.items():
            spent[name].append(Timer(work, timer=time.perf_counter).timeit(CALLS) / CALLS)
    yield spent
    holder.release()


@functools.cache
def measured():
    with room() as folder, Child(asking, folder) as child:
        child()
        return child()


@pytest.mark.parametrize(
    "arm",
    ["Holder.acquire, held", "another Holder's acquire and release", "Beam Shared.acquire", "a dictionary"],
)
def test_held(arm, play):
    play("held", arm, measured()[arm], ours=measured()["Holder.acquire, held"])
