"""A pickle that makes a file when it is read, in place of a model's skeleton.

Attackers: a damaged file (its checksum is wrong); another user, whose file or memfd lies where ours is expected; and, to
show that the payload works at all, a process of the same user with everything right, who may run code as us anyway.
Must happen: nothing is unpickled but in the last case, which SECURITY.md allows.
"""

import fcntl
import os
import pickle
import struct

import numpy as np
import pytest
from processes import Failed

NOBODY = 65534


class Payload:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def payload(scene):
    """A skeleton of which any part runs it."""
    evil = pickle.dumps(Payload(scene.proof), protocol=5)
    return b"1CSK" + struct.pack("<IQQQ", 1, len(evil), len(evil), len(evil)) + 3 * evil


def fitted(skeleton, length):
    """As long as the one that it replaces: the three lengths must add up to the whole."""
    head, body = skeleton[:32], skeleton[32:]
    table, named, _ = struct.unpack("<QQQ", head[8:])
    return head[:24] + struct.pack("<Q", length - 32 - table - named) + body.ljust(length - 32, b"\0")


def armed(scene, *, honest):
    segment = scene.segment()
    segment.forge(skeleton=fitted(payload(scene), len(segment.skeleton())), honest=honest)
    return segment


def publish(scene):
    """A skeleton with room for the payload."""
    return scene.store("posix").publish("model", [np.ones(1 << 17), "room" * 400])


def test_the_checksum_is_wrong(scene):
    lease = publish(scene)
    armed(scene, honest=False)
    scene.refuses(scene.victim(), "CorruptError", "skeleton checksum")
    lease.release()


def test_the_file_is_another_users(scene):
    lease = publish(scene)
    segment, victim = armed(scene, honest=True), scene.victim()
    os.chown(segment.path, NOBODY, NOBODY)
    scene.refuses(victim, "UnshareableError", "Operation not permitted")
    # The same file, ours again: only the owner was in the way.
    os.chown(segment.path, os.geteuid(), os.getegid())
    with pytest.raises(Failed):
        victim("attach", "attacked", "model")
    assert scene.proof.is_dir()
    lease.release()


def test_the_file_of_another_user_has_our_name(scene):
    """Moved there: another inode, so it is not opened for reading at all."""
    lease = publish(scene)
    segment, victim = armed(scene, honest=True), scene.victim()
    other = segment.path.with_name("theirs")
    other.write_bytes(segment.path.read_bytes())
    os.chown(other, NOBODY, NOBODY)
    other.replace(segment.path)
    with pytest.raises(Failed, match="ModelNotFoundError"):
        victim("attach", "attacked", "model")
    assert not scene.proof.exists()
    lease.release()


def test_the_memfd_is_another_users(scene):
    """Its row names device, inode and length of a sealed memfd that somebody handed us: all is right but the owner."""
    lease = publish(scene)
    segment, victim = armed(scene, honest=True), scene.victim()
    content = segment.path.read_bytes()
    fd = os.memfd_create("theirs", os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 15)
    os.fchown(fd, NOBODY, NOBODY)
    stat = os.fstat(fd)
    (index, row), *_ = scene.registry.rows("segments")
    registry = scene.registry
    registry.forge("segments", index, backend=0, device=stat.st_dev, inode=stat.st_ino, bytes=stat.st_size)
    registry.forge("leases", row["leases"], fd=fd)
    scene.refuses(victim, "UnshareableError", "Operation not permitted")
    os.fchown(fd, os.geteuid(), os.getegid())
    with pytest.raises(Failed):
        victim("attach", "attacked", "model")
    assert scene.proof.is_dir()
    os.close(fd)
    lease.release()
