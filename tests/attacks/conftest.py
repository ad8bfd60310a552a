"""A directory of its own for every attack, a model published in it, and victims: processes that know nothing of it."""

from __future__ import annotations

import gc
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forge import Registry, Segment
from processes import Failed, Forked, leave
from tasks import Model

import onecopy
from onecopy import process

NAMESPACE = "attacked"


class Scene:
    """Where it happens."""

    def __init__(self, folder: Path, tmp_path: Path, hatch: Callable[[], Forked]) -> None:
        self.folder = folder
        self.registry = Registry(folder, NAMESPACE)
        #: What the payloads make: it must not be there.
        self.proof = tmp_path / "payload-ran"
        self.log = tmp_path / "loads"
        self._hatch = hatch
        self._warned: set[tuple[int, str]] = set()

    def store(self, backend: str = "auto") -> onecopy.Store:
        return onecopy.Store(NAMESPACE, directory=self.folder, backend=backend)

    def publish(
        self, tag: str = "model", value: float = 1.0, *, backend: str = "posix", **options: Any
    ) -> onecopy.Lease:
        return self.store(backend).publish(tag, Model(value, mib=1), **options)

    def segment(self) -> Segment:
        """The only named one."""
        (path,) = self.segments()
        return Segment(path)

    def segments(self) -> list[Path]:
        return list(self.folder.glob(f"{self.registry.path.name}-*"))

    def victim(self) -> Forked:
        victim = self._hatch()
        victim("environment", "ONECOPY_DIR", str(self.folder))
        return victim

    def refuses(self, victim: Forked, error: str, match: str, tag: str = "model") -> None:
        """`attach` says what it met; `acquire` goes on alone, with the victim's own model; nothing has run."""
        with pytest.raises(Failed, match=match) as caught:
            victim("attach", NAMESPACE, tag)
        assert caught.value.name == error, caught.value
        assert re.search(f"{self.folder}|/proc/", caught.value.message), caught.value
        self.goes_private(victim, match, tag)
        assert not self.proof.exists()

    def goes_private(self, victim: Forked, match: str, tag: str = "model") -> None:
        """With one warning a process and tag that says why."""
        value, role, *_ = victim("acquire", NAMESPACE, tag, str(self.log), value=7.0, mib=1)
        assert (value, role) == (7.0 * 131072, "private")
        victim("release", tag)
        said = victim.said()
        if (victim.pid, tag) in self._warned:
            assert said == ""
        else:
            assert re.fullmatch(f"'{tag}' is not shared: .*({match}).*\n", said), said
        self._warned.add((victim.pid, tag))


@pytest.fixture
def folder(run_name: str) -> Iterator[Path]:
    """Removed after the victims, which may still be giving back what they had."""
    folder = Path("/dev/shm") / f"onecopy-{run_name}-{uuid.uuid4().hex[:8]}"
    folder.mkdir(mode=0o700)
    yield folder
    gc.collect()
    store = process.core_store(process.Place(NAMESPACE, str(folder)))
    try:
        leave(store)
    except onecopy.OneCopyError:  # the attack was on the registry
        store.leave()
    shutil.rmtree(folder)


@pytest.fixture
def scene(folder: Path, tmp_path: Path, hatch: Callable[[], Forked]) -> Scene:
    return Scene(folder, tmp_path, hatch)
