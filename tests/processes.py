"""Other processes for the tests: real ones, that can be asked, stopped and killed."""

from __future__ import annotations

import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SERVE = """
import os, pickle, sys, traceback
sys.path.insert(0, sys.argv[1])
incoming, outgoing = int(os.environ["ONECOPY_TEST_IN"]), int(os.environ["ONECOPY_TEST_OUT"])
reading, writing = os.fdopen(incoming, "rb", buffering=0), os.fdopen(outgoing, "wb", buffering=0)
import tasks
while True:
    try:
        name, args, kwargs = pickle.load(reading)
    except EOFError:
        break
    try:
        answer = True, getattr(tasks, name)(*args, **kwargs)
    except BaseException as error:
        answer = False, (type(error).__module__, type(error).__qualname__, str(error))
    writing.write(pickle.dumps(answer))
"""


#: Seconds after which a process that should end is ended.
PATIENCE = 60.0


def wait_until(condition: Callable[[], object]) -> None:
    """Without a limit of its own: the suite's ends a hang."""
    while not condition():
        time.sleep(0.01)


def within(seconds: float, condition: Callable[[], object]) -> bool:
    """Waits no longer than that, where a test that failed may have left something that never comes; whether it came."""
    ends = time.monotonic() + seconds
    while not (came := condition()) and time.monotonic() < ends:
        time.sleep(0.01)
    return bool(came)


def leave(store: Any) -> None:
    """This process out of the table of a core store, as at its exit, once its leases are given back.

    The housekeeping thread is about to do that: what it did after the exit would enter the table anew.
    """
    # A test that failed keeps its models for ever, by its traceback: the bound is for that.
    within(20, lambda: not _holds(store))
    # What is known not to be shareable is remembered as long as this process is in the table.
    store.leave()


def _holds(store: Any) -> bool:
    ready = (row for row in store.list() if row["state"] == "ready")
    return any(pid == os.getpid() for row in ready for pid, *_ in row["holders"])


class Failed(Exception):  # noqa: N818 (it is an answer)
    """What the other process raised."""

    def __init__(self, module: str, name: str, message: str) -> None:
        super().__init__(f"{module}.{name}: {message}")
        self.name = name
        self.message = message


class Other:
    """A process that runs functions of `tasks`, one after another."""

    def __init__(self, **environment: str) -> None:
        there_in, here_out = os.pipe()
        here_in, there_out = os.pipe()
        self._sending = os.fdopen(here_out, "wb")
        self._receiving = os.fdopen(here_in, "rb")
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(Path(__file__).parent)],
            pass_fds=(there_in, there_out),
            env={**os.environ, **environment, "ONECOPY_TEST_IN": str(there_in), "ONECOPY_TEST_OUT": str(there_out)},
            stderr=subprocess.PIPE,
        )
        os.close(there_in)
        os.close(there_out)
        self.pid = self.process.pid
        self._said = ""

    def start(self, task: str, *args: Any, **kwargs: Any) -> None:
        pickle.dump((task, args, kwargs), self._sending)
        self._sending.flush()

    def answers(self, within: float) -> bool:
        """Whether the result, or its end, is there after so many seconds at most."""
        return bool(select.select([self._receiving], [], [], within)[0])

    def result(self) -> Any:
        good, answer = pickle.load(self._receiving)
        if not good:
            raise Failed(*answer)
        return answer

    def __call__(self, task: str, *args: Any, **kwargs: Any) -> Any:
        self.start(task, *args, **kwargs)
        return self.result()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> str:
        """Lets it exit by itself; what it wrote to standard error."""
        if not self._sending.closed:
            self._sending.close()
            try:
                said = self.process.communicate(timeout=PATIENCE)[1]
            except subprocess.TimeoutExpired:
                self.kill()
                raise
            finally:
                self._receiving.close()
            self._said = said.decode()
        return self._said

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.kill()
        self.close()


class Forked:
    """A child that another process forked; asked as that one is."""

    def __init__(self, parent: Any, folder: Path, task: str = "fork_and_serve", *args: Any) -> None:
        self.parent = parent
        path = str(folder / f"{len(list(folder.iterdir()))}.socket")
        self._stderr = Path(path + ".stderr")
        self._heard = 0
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            Path(path).chmod(0o666)  # a child may have become another user
            listener.listen(1)
            self.pid: int = parent(task, *args, path)
            self._connection, _ = listener.accept()
        self._stream = self._connection.makefile("rwb")

    def start(self, task: str, *args: Any, **kwargs: Any) -> None:
        pickle.dump((task, args, kwargs), self._stream)
        self._stream.flush()

    def result(self) -> Any:
        good, answer = pickle.load(self._stream)
        if not good:
            raise Failed(*answer)
        return answer

    def __call__(self, task: str, *args: Any, **kwargs: Any) -> Any:
        self.start(task, *args, **kwargs)
        return self.result()

    def end(self, task: str, *args: Any) -> None:
        """By a task that does not answer."""
        self.start(task, *args)
        assert self._stream.read() == b""

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        wait_until(self.gone)

    def gone(self) -> bool:
        """Dead with all its threads, the last of which closes its descriptors; its parent may not have looked yet."""
        try:
            zombie = ") Z " in Path(f"/proc/{self.pid}/stat").read_text()
            return zombie and len(list(Path(f"/proc/{self.pid}/task").iterdir())) == 1
        except (FileNotFoundError, ProcessLookupError):
            return True

    def said(self) -> str:
        """What it wrote to standard error since the last time."""
        text = self._stderr.read_text()
        new, self._heard = text[self._heard :], len(text)
        return new

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._connection.close()
        # A test that failed may have left it in the middle of something that never ends.
        if not within(PATIENCE, self.gone):
            self.kill()
            raise AssertionError(f"process {self.pid} did not end by itself in {PATIENCE} s")
        said = self.said()
        assert not said, said
