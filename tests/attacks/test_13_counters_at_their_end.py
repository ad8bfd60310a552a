"""Generations, serials and commit counters at the last number there is.

Attacker: a process of the same user; nobody lives to count that far. Must happen: it goes on, with numbers that begin anew.
"""

import struct

import pytest
from forge import COMMITTED, U64
from processes import wait_until


@pytest.mark.parametrize("left", [0, 1, 3])
def test_all_of_them(scene, left):
    first = scene.publish()
    registry = scene.registry
    last = U64 - left
    registry.forge("heads", serial=last)
    registry.forge("entries", registry.entry("model"), generation=last, attempt=last, episode=last)
    registry.write(COMMITTED, struct.pack("=QQ", last, last))
    one, two = scene.victim(), scene.victim()
    seen = set()
    for _ in range(4):
        one("publish", "attacked", "model", 2.0, mib=1, replace=True)
        total, generation = two("attach", "attacked", "model")
        assert total == 2.0 * 131072
        seen.add(generation)
        two("release", "model")
        one("release", "model")
        assert one("acquire", "attacked", "fresh", str(scene.log), mib=1)[1] == "publisher"
        assert two("acquire", "attacked", "fresh", str(scene.log), mib=1)[1] == "attacher"
        one("release", "fresh")
        two("release", "fresh")
        wait_until(lambda: all(row.tag != "fresh" for row in scene.store().list()))
    assert len(seen) >= 2
    # Two reads without the lock: a release may be under way between them.
    wait_until(lambda: len(set(registry.counters())) == 1)
    assert registry.counters()[0] < 1000
    first.release()


def test_figures_that_no_table_has(scene):
    """Failures, deaths and times at the end of their range are remembered, not counted on."""
    lease = scene.publish()
    registry, victim = scene.registry, scene.victim()
    entry = registry.entry("model")
    registry.forge("entries", entry, failures=2**32 - 1, oom_deaths=2**32 - 1, since=U64, oom_since=U64, need=U64)
    assert victim("attach", "attacked", "model") == (131072.0, 1)
    victim("release", "model")
    lease.release()
    del lease
    wait_until(lambda: not scene.segments())
    assert registry.row("entries", entry)["failures"] == 2**32 - 1
    assert victim("fails", "attacked", "model", str(scene.log)) == "no such checkpoint"
