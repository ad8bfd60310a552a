"""Processes that are measured: forked from one that has imported everything and has done nothing with it.

What one does is a generator. It stops at each `yield`, which hands its value over, until it is told to go on.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import inspect
import mmap
import multiprocessing
import multiprocessing.connection
import multiprocessing.reduction
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np
from machine import MADV_POPULATE_READ, MADV_POPULATE_WRITE

PR_SET_PDEATHSIG = 1
#: The bit of a page that is there, in /proc/PID/pagemap.
PRESENT = 63
Play = Callable[..., Generator[Any, Any, None]]

#: When this process began, as the one that forked it read the clock, and as it did itself.
forked_at = alive_at = 0.0


class Failed(Exception):  # noqa: N818 (it is an answer)
    """The other process's traceback."""


class End:
    """What the other process is told last."""


class Fork:
    """What a parent is told that shall fork a child for us."""

    def __init__(self, play: Play, args: tuple[Any, ...]) -> None:
        self.play = play
        self.args = args


class Child:
    """A process that plays. Its first `yield` answers the first call."""

    def __init__(self, play: Play, *args: Any, parent: Child | None = None) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        self._ended = False
        if parent is None:
            self.pid = fork(play, args, theirs)
        else:
            # Its result is a pid; meanwhile the parent stays where it is.
            parent._connection.send(Fork(play, args))
            multiprocessing.reduction.send_handle(parent._connection, theirs.fileno(), parent.pid)
            self.pid = parent.hear()
        theirs.close()
        self._parent = parent

    def tell(self, what: object = None) -> None:
        self._connection.send(what)

    def hear(self) -> Any:
        good, answer = self._connection.recv()
        if not good:
            raise Failed(answer)
        return answer

    def __call__(self, what: object = None) -> Any:
        self.tell(what)
        return self.hear()

    def end(self) -> None:
        """By itself, after its `finally` clauses."""
        if self._ended:
            return
        self._ended = True
        # It may have failed, and gone.
        with contextlib.suppress(OSError):
            self._connection.send(End())
        if self._parent is None:
            os.waitpid(self.pid, 0)
        else:
            while Path(f"/proc/{self.pid}").exists():
                time.sleep(0.001)
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def fork(play: Play, args: tuple[Any, ...], connection: multiprocessing.connection.Connection) -> int:
    """The child's pid."""
    global forked_at
    sys.stdout.flush()
    sys.stderr.flush()
    forked_at = time.perf_counter()
    pid = os.fork()
    if not pid:
        _live(play, args, connection)
    return pid


def _live(play: Play, args: tuple[Any, ...], connection: multiprocessing.connection.Connection) -> NoReturn:
    global alive_at
    alive_at = time.perf_counter()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    status = 1
    playing = None
    try:
        playing = play(*args)
        told = _told(connection)
        while not isinstance(told, End):
            connection.send(
                (
                    True,
                    next(playing) if inspect.getgeneratorstate(playing) == inspect.GEN_CREATED else playing.send(told),
                )
            )
            told = _told(connection)
        status = 0
    except EOFError:
        pass
    except BaseException:
        text = traceback.format_exc()
        try:
            connection.send((False, text))
        except OSError:
            print(text, file=sys.stderr)
    finally:
        # Whatever ended it, Ctrl-C too: a peer has a cluster to shut down.
        try:
            if playing is not None:
                playing.close()
        except BaseException:
            status = 1
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _told(connection: multiprocessing.connection.Connection) -> Any:
    told = connection.recv()
    while isinstance(told, Fork):
        handle = multiprocessing.reduction.recv_handle(connection)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries it
        with multiprocessing.connection.Connection(handle) as theirs:
            connection.send((True, fork(told.play, told.args, theirs)))
        told = connection.recv()
    return told


@contextmanager
def children(plays: Iterable[tuple[Any, ...]]) -> Iterator[list[Child]]:
    with ExitStack() as stack:
        yield [stack.enter_context(Child(*play)) for play in plays]


def together(those: list[Child], what: object = None) -> list[Any]:
    """All at once; their answers."""
    for child in those:
        child.tell(what)
    return [child.hear() for child in those]


def as_if_never_forked() -> None:
    """In a child: it gets the page tables that its parent has, and its own copies of what is written to.

    fork(2) leaves both to the first use, which would be counted as the peer's.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    page = os.sysconf("SC_PAGE_SIZE")
    with Path(f"/proc/{os.getppid()}/pagemap").open("rb", buffering=0) as pagemap:
        for line in Path("/proc/self/maps").read_text().splitlines():
            where, rights, *_, name = (line + " ").split(maxsplit=5) if line.count(" ") > 5 else (*line.split(), "")
            start, end = (int(part, 16) for part in where.split("-"))
            if name.startswith("[v") or "r" not in rights:
                continue
            seen = os.pread(pagemap.fileno(), (end - start) // page * 8, start // page * 8)
            present = np.frombuffer(seen, np.uint64) >> np.uint64(PRESENT) & np.uint64(1)
            edges = np.flatnonzero(np.diff(present.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
            advice = MADV_POPULATE_WRITE if rights.startswith("rw") and rights[3] == "p" else MADV_POPULATE_READ
            for first, last in edges.tolist():
                at, size = start + first * page, (last - first) * page
                libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t(size), advice)


def have_free_pages(size: int) -> None:
    """So many bytes of free memory that is really there.

    A virtual machine gives free pages back to its host and fetches them again, at fifty times a fault's usual price; whoever
    runs after a process that has freed much would pay for it.
    """
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(MADV_POPULATE_WRITE)


def be_still() -> None:
    """Before children are forked: what was imported is no collector's business any more (it takes 0.2 s to look at).

    And the heap's free pages go: a child that used them, or gave them back, would seem to need less than it does.
    """
    gc.collect()
    gc.freeze()
    ctypes.CDLL(None).malloc_trim(0)
