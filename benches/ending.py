"""Told to end, a measurement first ends what it runs, and takes its files along."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def end_well(end: Callable[[int], object] = sys.exit) -> None:
    """`end` raises what unwinds this process; once, so that its `finally` clauses come to their ends."""

    def told(number: int, _: object) -> None:
        for one in SIGNALS:
            signal.signal(one, signal.SIG_IGN)
        end(128 + number)

    for number in SIGNALS:
        signal.signal(number, told)
