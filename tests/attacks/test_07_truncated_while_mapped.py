"""A segment that is cut while somebody computes with it.

Attacker: a process of the same user. Must happen, as SECURITY.md says of the two backends: nobody can cut or write a memfd,
not even its publisher. A named file can be cut by its owner: that is SIGBUS for who touches what is gone, and for nobody else.
"""

import ctypes
import mmap
import os
import signal
from pathlib import Path

import pytest

#: FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
PUNCH_HOLE = 3
EVERY_WAY = ("truncate", "grow", "write", "map", "punch")


def attack(path, how):
    with Path(path).open("r+b", buffering=0) as file:
        if how == "truncate":
            file.truncate(4096)
        elif how == "grow":
            file.truncate(1 << 30)
        elif how == "write":
            os.pwrite(file.fileno(), b"evil", 1 << 19)
        elif how == "map":
            mmap.mmap(file.fileno(), 0)[1 << 19] = 1
        else:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.fallocate(file.fileno(), PUNCH_HOLE, ctypes.c_long(0), ctypes.c_long(1 << 20)):
                raise OSError(ctypes.get_errno(), "fallocate")


def test_a_memfd_is_as_it_was(scene):
    lease = scene.publish(backend="memfd")
    victim = scene.victim()
    total, _ = victim("attach", "attacked", "model")
    for _, row in scene.registry.rows("leases"):
        pid = scene.registry.row("processes", row["owner_slot"])["pid"]
        for how in EVERY_WAY:
            with pytest.raises(PermissionError):
                attack(f"/proc/{pid}/fd/{row['fd']}", how)
    assert victim("total", "model") == total
    lease.release()


def test_a_named_segment_that_is_cut_kills_who_touches_it(scene):
    lease = scene.publish()
    toucher, other = scene.victim(), scene.victim()
    assert toucher("attach", "attacked", "model") == other("attach", "attacked", "model")
    segment = scene.segment()
    os.truncate(segment.path, 4096)
    toucher.end("total", "model")
    assert os.waitstatus_to_exitcode(toucher.parent("reap", toucher.pid)) == -signal.SIGBUS
    # The others live, and whoever comes does not get what was cut.
    value, role, *_ = scene.victim()("acquire", "attacked", "model", str(scene.log), value=2.0, mib=1)
    assert (value, role) == (2.0 * 131072, "publisher")
    other("release", "model")
    lease.release()


def test_a_named_segment_that_is_cut_before_it_is_read(scene):
    """The registry's length decides: it is another object by now."""
    lease = scene.publish()
    os.truncate(scene.segment().path, 4096)
    assert scene.victim()("acquire", "attacked", "model", str(scene.log), value=2.0, mib=1)[1] == "publisher"
    lease.release()
