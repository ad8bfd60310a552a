"""The verbs as a step of `test_verbs_model`: in whatever process, with plain values as answers."""

from __future__ import annotations

import numpy as np

import onecopy
from onecopy.errors import OneCopyError

#: What this process holds, by the numbers that the test gives.
HELD: dict[int, onecopy.Lease | onecopy.Holder[Weights]] = {}
COUNT = (1 << 20) // 8


class Weights:
    """A mebibyte: less is not worth a segment."""

    def __init__(self, value: float) -> None:
        self.weights = np.full(COUNT, value)

    def sum(self) -> float:
        return float(self.weights.sum()) / COUNT


def verb(name: str, *args: object) -> tuple[str, object]:
    """Its answer, or the name of the error that it raised."""
    try:
        return "ok", globals()[name](*args)
    except OneCopyError as error:
        return type(error).__name__, None


def acquire(namespace: str, number: int, tag: str, value: float, with_holder: bool) -> tuple[float, int, str]:  # noqa: FBT001
    if with_holder:
        holder = onecopy.Holder(lambda: Weights(value), tag, store=onecopy.Store(namespace))
        holder.acquire()
        HELD[number] = holder
        assert holder.info is not None
        return _model(number).sum(), holder.info.generation, holder.info.role
    lease = onecopy.Store(namespace).acquire(tag, lambda: Weights(value))
    return _keep(number, lease)


def publish(namespace: str, number: int, tag: str, value: float, replace: bool, pin: bool) -> tuple[float, int, str]:  # noqa: FBT001
    return _keep(number, onecopy.Store(namespace).publish(tag, Weights(value), replace=replace, pin=pin))


def attach(namespace: str, number: int, tag: str) -> tuple[float, int, str]:
    return _keep(number, onecopy.Store(namespace).attach(tag))


def release(number: int) -> None:
    HELD.pop(number).release()


def release_all() -> None:
    HELD.clear()


def read(number: int) -> float:
    return _model(number).sum()


def write(number: int, change: float) -> None:
    _model(number).weights[:] += change


def remove(namespace: str, tag: str) -> int:
    return onecopy.Store(namespace).remove(tag)


def verify(namespace: str, tag: str) -> int:
    return onecopy.Store(namespace).verify(tag)


def sweep(namespace: str, dry_run: bool) -> None:  # noqa: FBT001
    onecopy.Store(namespace).sweep(dry_run=dry_run)


def listed(namespace: str, tag: str | None) -> list[tuple[str, int, bool, bool, list[int]]]:
    """(tag, generation, unnamed, pinned, pids) of what is alive; of one tag, if given."""
    store = onecopy.Store(namespace)
    return sorted(
        (row.tag, row.generation, row.unnamed, row.pinned, sorted({holder.pid for holder in row.holders}))
        for row in (store.show(tag) if tag else store.list())
        if row.state == "ready"
    )


def _keep(number: int, lease: onecopy.Lease) -> tuple[float, int, str]:
    HELD[number] = lease
    return _model(number).sum(), lease.info.generation, lease.info.role


def _model(number: int) -> Weights:
    held = HELD[number]
    model: Weights = held.object if isinstance(held, onecopy.Lease) else held.acquire()
    return model
