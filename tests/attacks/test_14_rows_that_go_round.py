"""Links that lead back to where they come from, beyond the table, or into a list of somebody else's, with checksums that fit.

Attacker: a process of the same user, or a defect of ours. Must happen: CorruptError within a bounded time, whatever is
asked; the lock is let go, and models load privately.
"""

import os
import signal

import pytest
from forge import NONE
from processes import Failed

from onecopy.errors import CorruptError


@pytest.fixture
def forged(scene):
    """Whoever has the models is stopped, so that nobody else changes the rows."""
    publisher = scene.victim()
    publisher("publish", "attacked", "model", mib=1, backend="posix")
    publisher("publish", "attacked", "second", mib=1, backend="memfd")
    with scene.registry.locked():
        os.kill(publisher.pid, signal.SIGSTOP)
    yield scene.registry
    os.kill(publisher.pid, signal.SIGCONT)


def lies(registry):
    model, second = registry.entry("model"), registry.entry("second")
    segment = registry.row("entries", model)["current"]
    lease = registry.row("segments", segment)["leases"]
    return [
        ("entries", model, {"current": 8191}),
        ("entries", model, {"current": registry.row("entries", second)["current"]}),
        ("segments", segment, {"leases": 16_383}),
        ("segments", segment, {"leases": NONE - 1}),
        ("segments", segment, {"state": 1}),
        ("segments", segment, {"state": 9}),
        ("segments", segment, {"entry": second}),
        ("leases", lease, {"segment": segment + 1}),
        ("leases", lease, {"next": NONE - 1, "owner_slot": 1023}),
        ("leases", lease, {"previous": 16_383, "owner_slot": 1023}),
    ]


def test_lists(scene, forged):
    victim = scene.victim()
    for table, index, change in lies(forged):
        before = forged.row(table, index)
        forged.forge(table, index, **change)
        with pytest.raises(Failed, match="CorruptError"):
            victim("attach", "attacked", "model")
        forged.forge(table, index, **before)
    assert victim("attach", "attacked", "model") == (131072.0, 1)


def test_the_free_rows(scene, forged):
    heads = forged.row("heads")
    used = forged.row("entries", forged.entry("model"))["segments"]
    for change in (
        {"segments_free": used},
        {"leases_free": heads["leases_high"] - 1},
        {"entries_free": forged.entry("model")},
        {"segments_high": 8193},
        {"processes": 1025},
    ):
        forged.forge("heads", **{**heads, **change})
        victim = scene.victim()
        scene.goes_private(victim, "a free one|below|at most", tag="third")
        forged.forge("heads", **heads)
    assert scene.victim()("attach", "attacked", "model")[0] == 131072.0


def test_a_list_that_does_not_end(scene, forged):
    model = forged.entry("model")
    segment = forged.row("entries", model)["segments"]
    forged.forge("segments", segment, next=segment)
    victim = scene.victim()
    for verb in (scene.store().list, scene.store().sweep):
        with pytest.raises(CorruptError, match="does not end"):
            verb()
    forged.forge("segments", segment, next=NONE)
    bucket = forged.bucket(model)
    forged.forge("entries", model, next=model, hash=forged.row("entries", model)["hash"][:4] + b"\0" * 12)
    assert forged.row("buckets", bucket)["first"] == model
    with pytest.raises(Failed, match=r"CorruptError.*does not end"):
        victim("attach", "attacked", "model")
