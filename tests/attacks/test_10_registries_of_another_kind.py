"""A registry of another build, another version, another length.

Attacker: another build of onecopy, a full disk, a person with `truncate`. Must happen: CorruptError with what was found and
what was expected; a file that nobody finished making (its first 80 bytes are zero) is made anew, as docs/format.md says.
"""

import os

import pytest
from forge import LENGTH


@pytest.fixture
def forged(scene):
    scene.publish(tag="other").release()
    return scene.registry


def test_another_stamp(scene, forged):
    victim = scene.victim()
    for change, what in (
        ({"magic": b"ONECOPYR"}, "magic"),
        ({"format": 2}, "format"),
        ({"format": 0}, "format"),
        ({"layout": 1}, "table layout"),
    ):
        before = forged.read(0, 64)
        forged.stamp(**change)
        scene.refuses(victim, "CorruptError", what)
        forged.write(0, before)
    forged.write(16, b"\xff")
    scene.refuses(victim, "CorruptError", "checksum of the head")


@pytest.mark.parametrize("length", [81, 100, 200, 255])
def test_cut_in_its_head(scene, forged, length):
    os.truncate(forged.path, length)
    scene.refuses(scene.victim(), "CorruptError", "head|heads")


def test_cut_behind_its_head(scene, forged):
    """Every row that is asked for is missing."""
    os.truncate(forged.path, 4096)
    scene.refuses(scene.victim(), "CorruptError", "checksum of a row|row")


@pytest.mark.parametrize("length", [0, 80, 4096])
def test_nobody_finished_it(scene, forged, length):
    os.truncate(forged.path, 0)
    os.truncate(forged.path, length)
    victim = scene.victim()
    assert victim("acquire", "attacked", "model", str(scene.log), value=2.0, mib=1)[1] == "publisher"
    assert forged.path.stat().st_size == LENGTH
    victim("release", "model")


def test_a_tebibyte_long(scene, forged):
    """Sparse: what lies behind the tables is nobody's, and is not read."""
    lease = scene.publish()
    os.truncate(forged.path, 1 << 40)
    victim = scene.victim()
    assert victim("attach", "attacked", "model") == (131072.0, 1)
    victim("release", "model")
    assert forged.path.stat().st_blocks * 512 < 1 << 20
    lease.release()
