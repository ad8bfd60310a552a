"""A lease row whose process and descriptor lead to another file: a secret, /dev/zero, a FIFO, /proc/self/mem, a terminal.

Attacker: a process of the same user, or pids and descriptors that are used again. Must happen: what is found is opened with
O_PATH and looked at; where it is not the memfd of the row, nothing of it is opened for reading, and nobody waits for it.
"""

import fcntl
import os
import stat
from pathlib import Path

import pytest
from processes import Failed


def opened(kind, folder):
    if kind == "a secret":
        path = folder / "secret"
        path.write_bytes(b"secret" * 700_000)
        path.chmod(0o600)
        return os.open(path, os.O_RDONLY)
    if kind == "a FIFO":
        path = folder / "fifo"
        os.mkfifo(path)
        return os.open(path, os.O_RDWR)
    if kind == "a terminal":
        return os.openpty()[1]
    if kind == "a pipe":
        return os.pipe()[0]
    if kind == "nothing":
        return -1
    return os.open(kind, os.O_RDONLY)


KINDS = (
    "a secret",
    "a FIFO",
    "a terminal",
    "a pipe",
    "/dev/zero",
    "/proc/self/mem",
    "/proc/self/ns/pid",
    "/",
    "nothing",
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_descriptor(scene, kind):
    lease = scene.publish(backend="memfd")
    registry, victim = scene.registry, scene.victim()
    fd = opened(kind, scene.folder)
    (index, _), *_ = registry.rows("leases")
    registry.forge("leases", index, fd=fd)
    with pytest.raises(Failed, match="ModelNotFoundError"):
        victim("attach", "attacked", "model")
    assert victim("acquire", "attacked", "model", str(scene.log), value=2.0, mib=1)[1] == "publisher"
    victim("release", "model")
    if fd >= 0:
        os.close(fd)
    lease.release()


def test_a_secret_that_has_the_identity_too(scene):
    """Device, inode, length, owner: all as in the row. It has no seals, so it is none of ours."""
    lease = scene.publish(backend="memfd")
    registry, victim = scene.registry, scene.victim()
    fd = opened("a secret", scene.folder)
    found = os.fstat(fd)
    assert stat.S_ISREG(found.st_mode)
    (index, row), *_ = registry.rows("leases")
    registry.forge("leases", index, fd=fd)
    registry.forge("segments", row["segment"], device=found.st_dev, inode=found.st_ino, bytes=found.st_size)
    with pytest.raises(Failed, match="ModelNotFoundError"):
        victim("attach", "attacked", "model")
    os.close(fd)
    lease.release()


@pytest.mark.parametrize("missing", [1, 2, 4, 8])
def test_a_memfd_that_can_still_be_changed(scene, missing):
    """All four seals are needed: with one less, its bytes could change after they were checked."""
    lease = scene.publish(backend="memfd")
    registry = scene.registry
    (index, row), *_ = registry.rows("leases")
    for seals in (15, 15 & ~missing):
        victim = scene.victim()
        fd = os.memfd_create("ours", os.MFD_ALLOW_SEALING)
        os.write(fd, Path(f"/proc/self/fd/{row['fd']}").read_bytes())
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        registry.forge("leases", index, fd=fd)
        registry.forge("segments", row["segment"], inode=os.fstat(fd).st_ino)
        if seals == 15:  # or the other one would be refused for another reason
            assert victim("attach", "attacked", "model") == (131072.0, 1)
        else:
            with pytest.raises(Failed, match="ModelNotFoundError"):
                victim("attach", "attacked", "model")
        os.close(fd)
    lease.release()


@pytest.mark.parametrize("pid", [1, "parent", 0, 2**31, 2**32 - 1])
def test_another_process(scene, pid):
    """A pid that is used again, one that never was, 0, one beyond: its descriptor is another one, or it cannot be reached."""
    lease = scene.publish(backend="memfd")
    registry = scene.registry
    (_, row), *_ = registry.rows("leases")
    registry.forge("processes", row["owner_slot"], pid=os.getppid() if pid == "parent" else pid)
    victim = scene.victim()
    with pytest.raises(Failed, match=r"ModelNotFoundError|UnshareableError|ModelTimeoutError"):
        victim("attach", "attacked", "model", 0.1)
    assert lease.object.total() == 131072.0
    lease.release()
