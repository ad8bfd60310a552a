"""A redo record that was left to be applied, and writes where nothing of ours is.

Attacker: a process of the same user, or a torn write. Must happen: CorruptError before a byte of it is written; applied is
only what is rows of the tables, each in its place.
"""

import struct

import pytest
from forge import APPLIED, COMMITTED, LENGTH, REDO, U64, checksum


@pytest.fixture
def forged(scene):
    writer = scene.victim()
    writer("publish", "attacked", "other")
    writer.end("exit_cleanly")
    return scene.registry


def item(table, index, body):
    return struct.pack("=II", table, index) + body


def test_records_that_are_none(scene, forged):
    victim, lease = scene.victim(), b"\x55" * 52
    before = forged.path.read_bytes()
    for body in (
        item(4, 16_384, lease),  # behind its table
        item(4, 2**32 - 1, lease),
        item(7, 0, lease),  # a table that is not there
        item(2**32 - 1, 0, lease),
        item(4, 0, lease[:-1]),  # cut
        item(4, 0, lease) + b"\0" * 7,
        item(0, 1, b"\0" * 44),  # heads have one row
    ):
        forged.leave_undone(body)
        scene.refuses(victim, "CorruptError", "redo record")
        changed = forged.path.read_bytes()
        assert changed[128:REDO] == before[128:REDO]
        assert len(changed) == LENGTH
    for length in (2**32 - 1, LENGTH - REDO, LENGTH - REDO - 15):
        forged.leave_undone(item(4, 0, lease), length=length)
        scene.refuses(victim, "CorruptError", "redo record")
    assert forged.path.stat().st_size == LENGTH


def test_counters_that_are_not_one_apart(scene, forged):
    victim = scene.victim()
    for committed, applied in ((5, 3), (3, 5), (0, 1), (U64, 3)):
        forged.write(COMMITTED, struct.pack("=QQ", committed, applied))
        scene.refuses(victim, "CorruptError", "commit counters|redo record")


def test_one_that_is_right_is_applied(scene, forged):
    """Or the others would be refused for another reason than theirs."""
    body = struct.pack("=QQIIiIIIQ", 1, 2, 3, 4, 5, 6, 7, 0, 8)
    forged.leave_undone(item(4, 9, body + checksum(4, 9, body)))
    victim = scene.victim()
    assert victim("acquire", "attacked", "model", str(scene.log), value=2.0, mib=1)[1] == "publisher"
    assert forged.row("leases", 9)["serial"] == 2
    committed, applied = struct.unpack("=QQ", forged.read(COMMITTED, 16))
    assert committed == applied
    assert APPLIED == COMMITTED + 8
    victim("release", "model")
