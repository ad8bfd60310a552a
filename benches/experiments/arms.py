"""The rows of the tables: in which processes the work is done, and what holds the model there."""

from __future__ import annotations

import functools
import subprocess
from dataclasses import dataclass
from typing import Any, Literal

#: A process in namespaces of its own, as containers have them; not everybody may make these.
APART = "unshare --mount --ipc --pid --fork --kill-child --mount-proc"


@dataclass(frozen=True)
class Arm:
    #: As in the document's tables.
    title: str
    #: One worker in one process; so many threads in one; so many processes; these, each in namespaces of its own.
    workers: Literal["one", "threads", "processes", "containers"] = "processes"
    #: Beam's `large_model=True`.
    large_model: bool = False
    #: SharedMemoryModelHandler around Beam's handler.
    wrapped: bool = False
    #: Where the wrapper's switch stands.
    switch: str = "auto"
    #: A handler of one's own, made to share the page cache.
    by_hand: bool = False

    def handler(self, model: Any, folder: str) -> Any:
        if self.by_hand:
            return model.by_hand(folder)
        plain = model.handler(folder, large_model=self.large_model)
        if not self.wrapped:
            return plain
        from onecopy.beam import SharedMemoryModelHandler

        return SharedMemoryModelHandler(plain)


@functools.cache
def containers() -> bool:
    """Whether they can be made here."""
    return subprocess.run([*APART.split(), "true"], check=False, capture_output=True).returncode == 0


ARMS = {
    "one": Arm("one process", "one"),
    "threads": Arm("one process, N threads", "threads"),
    "containers": Arm("N containers, shared.py", "containers"),
    "containers-onecopy": Arm("N containers, onecopy (ONECOPY_DIR)", "containers", wrapped=True),
    "shared": Arm("N processes, shared.py"),
    "mps": Arm("N processes, large_model=True (MPS)", large_model=True),
    "onecopy": Arm("N processes, onecopy", wrapped=True),
    "off": Arm("N processes, onecopy switched off (ONECOPY=off)", wrapped=True, switch="off"),
    "by-hand": Arm("N processes, mapped checkpoint by hand", by_hand=True),
}
