"""Row 2: a process that has had the model before, and let go of it, gets it again; beside Ray, to which it is connected."""

import functools
import time
from pathlib import Path

import pytest
from children import Child, as_if_never_forked
from company import assembled
from peers import BY_NAME, OURS
from rounds import ROUNDS
from shapes import BERT, largest

RAY = BY_NAME["Ray + zerocopy"]
SHAPE = largest(BERT)


def again(tickets, shape, folder):
    """Plays in a child."""
    as_if_never_forked()
    for peer in (RAY, OURS):
        peer.ready(tickets[peer.name])
    yield None
    spent = {RAY.name: [], OURS.name: []}
    expected = None
    for number in range(ROUNDS * 10 + 1):
        for peer in (RAY, OURS) if number % 2 else (OURS, RAY):
            start = time.perf_counter()
            model = peer.attach(shape, folder, tickets[peer.name])
            seconds = time.perf_counter() - start
            output = shape.predict(model)
            expected = output if expected is None else expected
            assert (output == expected).all(), peer.name
            del model
            peer.let_go()
            while peer is OURS and "memfd:onecopy" in Path("/proc/self/maps").read_text():
                time.sleep(0.001)
            # The first one was not the process's second.
            if number:
                spent[peer.name].append(seconds)
    yield spent
    RAY.left()


@functools.cache
def measured():
    with assembled([RAY, OURS], SHAPE) as served:
        tickets = {one.peer.name: one.putter()[0] for one in served}
        with Child(again, tickets, SHAPE, served[0].folder) as child:
            child()
            return child()


@pytest.mark.parametrize("peer", [OURS.name, RAY.name])
def test_warm(peer, play):
    play(f"warm {SHAPE.name}", peer, measured()[peer], ours=measured()[OURS.name], size=SHAPE.size)
