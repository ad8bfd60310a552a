"""Somebody renames other files over ours all the time: over the segments, and over the registry.

Attacker: a process of the same user (in a directory of ours, or with the sticky bit, nobody else can). Must happen, however the
race ends: a right model or an error with a name. What is used was checked on the descriptor that is used, so a payload
under our name never runs.
"""

import re
import time

import pytest
from test_05_hostile_skeletons import armed, publish

ROUNDS = 60


@pytest.fixture
def swapper(scene):
    """A process that swaps until the test ends."""
    swapper = scene.victim()

    def begin(pattern, evil):
        swapper.start("swap_for_ever", str(scene.folder), pattern, evil)

    yield begin
    swapper.kill()


def loads_and_attaches(scene):
    one, two = scene.victim(), scene.victim()
    roles = set()
    for number in range(ROUNDS):
        for victim in (one, two):
            value, role, *_ = victim("acquire", "attacked", "model", str(scene.log), value=7.0, mib=1, backend="posix")
            assert value == 7.0 * 131072
            roles.add(role)
        if number % 3 == 2:
            one("release", "model")
            two("release", "model")
    one.said()
    two.said()
    assert not scene.proof.exists()
    return roles


def test_segments(scene, swapper):
    lease = publish(scene)
    evil = armed(scene, honest=True).path.read_bytes()
    lease.release()
    del lease
    while scene.segments():
        time.sleep(0.01)
    swapper(re.escape(scene.registry.path.name) + "-[0-9a-f]{32}", evil)
    roles = loads_and_attaches(scene)
    assert "publisher" in roles


def test_the_registry(scene, swapper):
    scene.publish(tag="other").release()
    evil = bytearray(scene.registry.path.read_bytes()[: 1 << 20])
    evil[16:32] = b"evil" * 4
    swapper(re.escape(scene.registry.path.name), bytes(evil))
    assert loads_and_attaches(scene) & {"publisher", "attacher", "private"}
