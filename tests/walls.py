"""Walls between processes, as containers and users have them: tasks for a forked child (see `tasks`), most of which need root.

Each changes the process that it runs in, and goes with it: no mount, no namespace and no file is left behind.
"""

from __future__ import annotations

import codecs
import ctypes
import fcntl
import logging
import os
import signal
import socket
from pathlib import Path

from onecopy import _key

LIBC = ctypes.CDLL(None, use_errno=True)
#: unshare(2)
WALLS = {"mount": 0x0002_0000, "ipc": 0x0800_0000, "user": 0x1000_0000, "pid": 0x2000_0000}
MS_REC, MS_PRIVATE = 0x4000, 1 << 18
PR_SET_DUMPABLE = 4

_heard: list[str] = []


def _call(name: str, *arguments: int | bytes | None) -> None:
    if getattr(LIBC, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}{arguments}: {os.strerror(number)}")


def apart(*walls: str, root: int = 0) -> None:
    """Behind such walls; "pid": only what is forked from now on. "user": `root` is who root inside is outside."""
    begin, begun = os.pipe()
    helper = os.fork() if "user" in walls else 0
    if "user" in walls and not helper:
        os.read(begin, 1)
        for kind in ("uid", "gid"):
            Path(f"/proc/{os.getppid()}/{kind}_map").write_text(f"0 {root} 1")
        os._exit(0)
    _call("unshare", sum(WALLS[wall] for wall in walls))
    os.write(begun, b"x")
    if helper:
        assert os.waitpid(helper, 0)[1] == 0
    os.close(begin)
    os.close(begun)
    if "pid" in walls:
        # Its first process cannot end before somebody has waited for all the others.
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    if "mount" in walls:
        _call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)


def own_proc() -> None:
    """As a container has it: with the numbers that processes have inside."""
    _call("mount", b"proc", b"/proc", b"proc", 0, None)


def own_shm(directory: str = "/dev/shm") -> None:
    Path(directory).mkdir(exist_ok=True)
    _call("mount", b"tmpfs", directory.encode(), b"tmpfs", 0, b"size=64m,mode=1777")


def become(user: int, group: int | None = None, *, dumpable: bool = True) -> None:
    """setuid(2) without exec; the kernel takes such a process for one with secrets, until it says otherwise."""
    # What reads files that the new user may not.
    _key.compatibility()
    codecs.lookup("ascii")
    os.setgroups([])
    os.setresgid(*[user if group is None else group] * 3)
    os.setresuid(user, user, user)
    be_dumpable(whether=dumpable)


def be_dumpable(*, whether: bool) -> None:
    _call("prctl", PR_SET_DUMPABLE, int(whether), 0, 0, 0)


def pid() -> int:
    """As this process knows itself."""
    return os.getpid()


def next_pid(number: int) -> None:
    """Of the next process in this PID namespace."""
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(number - 1))


def open_at(number: int, path: str) -> None:
    """Opens a file under this very number."""
    os.dup2(os.open(path, os.O_RDONLY), number)


def fork_without_handlers() -> int:
    """A child that has all that we have, as raw clone(2) makes it: nobody told it to close anything."""
    child = ctypes.PyDLL(None)._Fork()
    while child == 0:
        signal.pause()
    return int(child)


def end_process(number: int) -> None:
    os.kill(number, signal.SIGKILL)


def hear() -> None:
    """What the logger says from now on is kept, not written to standard error."""

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            _heard.append(record.getMessage())

    logging.getLogger("onecopy").addHandler(Kept(logging.WARNING))


def heard() -> list[str]:
    said = list(_heard)
    _heard.clear()
    return said


def plant(kind: str, path: str, target: str) -> None:
    """Puts something hostile under a name, for anybody to open."""
    os.umask(0)
    if kind == "folder":
        Path(path).mkdir()
    elif kind == "fifo":
        os.mkfifo(path, 0o666)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
    elif kind == "link":
        Path(path).symlink_to(target)
    else:
        mode = 0o600 if kind == "closed file" else 0o666
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)  # stays open
        os.write(file, b"hostile" * 100)
        if kind == "lease":
            # Whoever opens it waits until we give it back; the signal that asks for it is SIGIO, which kills.
            signal.signal(signal.SIGIO, signal.SIG_IGN)
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)


def forbidden(call: str, *arguments: object) -> str:
    """The kernel's word for what happens when `os.<call>` is tried."""
    try:
        getattr(os, call)(*arguments)
    except OSError as error:
        return os.strerror(error.errno or 0)
    return "allowed"


def lock_through(path: str) -> list[str]:
    """What comes of each way to lock a file that may not be opened: O_PATH opens everything."""
    file = os.open(path, os.O_PATH)
    said = [forbidden("open", f"/proc/self/fd/{file}", os.O_RDONLY)]
    for lock in (fcntl.flock, fcntl.lockf):
        try:
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            said.append("allowed")
        except OSError as error:
            said.append(os.strerror(error.errno or 0))
    os.close(file)
    return said
