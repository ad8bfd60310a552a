"""Threads per process, where many processes run inference at the same time."""

import logging
import os
import sys
from pathlib import Path
from typing import Literal

from apache_beam.options.value_provider import RuntimeValueProvider

logger = logging.getLogger(__name__)
Threads = int | Literal["auto"] | None
_told: list[bool] = []


def apply(setting: Threads) -> None:
    """Set torch's threads in this process (None leaves them), and say once where the machine is oversubscribed.

    "auto" is the CPUs of the cgroup over the SDK worker processes. Another number of threads may change the last bits
    of a sum.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return
    processes, available = sdk_workers(), cpus()
    if setting is not None:
        torch.set_num_threads(max(1, available // processes) if setting == "auto" else setting)
    if not _told and processes * torch.get_num_threads() > 2 * available:
        _told.append(True)
        logger.info(
            "%d SDK worker processes with %d torch threads each share %d CPUs; torch_num_threads='auto' would give %d",
            processes, torch.get_num_threads(), available, max(1, available // processes),
        )  # fmt: skip


def cpus() -> int:
    """CPUs that this process may use: its affinity, and the quota of its cgroup (both versions), at least 1."""
    allowed = len(os.sched_getaffinity(0))
    for quota, period in (_cgroup_v2(), _cgroup_v1()):
        if quota > 0 and period > 0:
            allowed = min(allowed, -(-quota // period))
    return max(1, allowed)


def sdk_workers() -> int:
    """SDK worker processes on this machine: as many as the options declare or /proc shows, at least this one."""
    declared: int = RuntimeValueProvider.get_value("direct_num_workers", int, 0)
    return max(1, declared, sum(map(_is_sdk_worker, Path("/proc").glob("[0-9]*/cmdline"))))


def _is_sdk_worker(cmdline: Path) -> bool:
    try:
        program, *arguments = cmdline.read_bytes().split(b"\0")
    except OSError:  # it has just ended
        return False
    # Not the `sh -c` that FnApiRunner starts a worker with, and not the worker pool.
    return b"python" in program.rpartition(b"/")[2] and any(
        b"apache_beam.runners.worker.sdk_worker" in argument for argument in arguments
    )


def _cgroup_v2() -> tuple[int, int]:
    try:
        own = Path("/proc/self/cgroup").read_text().split("0::", 1)[1].splitlines()[0]
        quota, period = Path(f"/sys/fs/cgroup{own}/cpu.max").read_text().split()
        return int(quota), int(period)
    except (OSError, IndexError, ValueError):  # no version 2 here, or "max"
        return 0, 0


def _cgroup_v1() -> tuple[int, int]:
    room = Path("/sys/fs/cgroup/cpu")
    try:
        return int((room / "cpu.cfs_quota_us").read_text()), int((room / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return 0, 0
