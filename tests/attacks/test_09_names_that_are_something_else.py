"""Links, FIFOs, directories, devices, and other users' files under the names of registry and segment.

Attackers: another user, who may put a file of his under our name in a directory that everybody may write to (/dev/shm);
a process of the same user by accident. Must happen: UntrustedError for the registry, which names it; a segment that is
something else is not there. Nobody waits for a FIFO's other end, opens a device, follows a link, or writes to any of them.
"""

import os
import stat

import pytest
from processes import Failed

NOBODY = 65534


def make(path, kind, target):
    if kind == "link":
        path.symlink_to(target)
    elif kind == "dangling link":
        path.symlink_to(target.with_name("nowhere"))
    elif kind == "hard link":
        os.link(target, path)
    elif kind == "FIFO":
        os.mkfifo(path, 0o600)
    elif kind == "directory":
        path.mkdir(mode=0o700)
    elif kind == "device":
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero
    else:
        path.write_bytes(target.read_bytes())
        if kind == "others may read it":
            path.chmod(0o640)
        else:
            path.chmod(0o600)
            os.chown(path, NOBODY, NOBODY)


KINDS = ("link", "dangling link", "hard link", "FIFO", "directory", "device", "others may read it", "another user's")


def remove(path):
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink()


def test_the_registry(scene):
    writer = scene.victim()
    writer("publish", "attacked", "model")
    writer.end("exit_cleanly")
    real = scene.registry.path.with_name("real")
    scene.registry.path.rename(real)
    before = real.read_bytes()
    for kind in KINDS:
        make(scene.registry.path, kind, real)
        victim = scene.victim()
        scene.refuses(victim, "UntrustedError", "regular file|names|belongs to user|mode is")
        with pytest.raises(Failed, match="UntrustedError"):
            victim("publish", "attacked", "model")
        remove(scene.registry.path)
    assert real.read_bytes() == before
    assert not real.with_name("nowhere").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_segment(scene, kind):
    """What the row names is another object: whoever asks loads."""
    lease = scene.publish()
    (path,) = scene.segments()
    real = path.with_name("real")
    path.rename(real)
    make(path, kind, real)
    victim = scene.victim()
    if kind == "hard link":  # the very same object
        assert victim("attach", "attacked", "model") == (131072.0, 1)
    else:
        with pytest.raises(Failed, match="ModelNotFoundError"):
            victim("attach", "attacked", "model")
        assert victim("acquire", "attacked", "model", str(scene.log), value=2.0, mib=1)[1] == "publisher"
    victim("release", "model")
    lease.release()
    del lease


@pytest.mark.parametrize("kind", ["FIFO", "directory", "device", "link"])
def test_what_a_sweep_would_remove(scene, kind):
    """Under the name of a segment that nobody has: it is not opened in a way that waits, and not removed."""
    lease = scene.publish()
    stray = scene.folder / f"{scene.registry.path.name}-{'0' * 32}"
    make(stray, kind, scene.folder)
    scene.store().sweep()
    assert os.path.lexists(stray)
    remove(stray)
    lease.release()
