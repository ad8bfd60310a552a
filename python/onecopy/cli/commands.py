"""One function a command: print for a person, or as JSON for a script."""

from __future__ import annotations

import fcntl
import importlib
import json
import shlex
import struct
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onecopy import process
from onecopy.cli import machine, memory
from onecopy.errors import BadNameError

if TYPE_CHECKING:
    import argparse

    from onecopy.info import StoredModel
    from onecopy.store import Store

UNIT = 1024


def ls(store: Store, options: argparse.Namespace) -> int:
    models = store.list()
    if options.json:
        return _json([_plain(model) for model in models])
    if not models:
        print(f"no models in namespace '{store.place.namespace}' ({process.core_store(store.place).path})")
        others = sorted(machine.namespaces(store.place) - {store.place.namespace})
        if others:
            print(f"other namespaces there: {', '.join(others)} (--namespace)")
        return 0
    rows = [
        (
            _shown(model.tag),
            _shown(model.version or "-"),
            _state(model),
            str(model.generation),
            _size(model.shared_bytes),
            model.backend or "-",
            str(len(model.holders)),
            _ago(model.since),
        )
        for model in models
    ]
    rows.insert(0, ("TAG", "VERSION", "STATE", "GEN", "SIZE", "BACKEND", "HOLDERS", "SINCE"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def show(store: Store, options: argparse.Namespace) -> int:
    models = store.show(options.tag)
    if options.json:
        return _json([_plain(model, costs=True) for model in models])
    for model in models:
        version = f" version {_shown(model.version)}" if model.version else ""
        print(
            f"{_shown(model.tag)}{version}: {_state(model)}, generation {model.generation}, since {_ago(model.since)}"
        )
        print(f"  {_size(model.shared_bytes)} ({model.shared_bytes} bytes), backend {model.backend or '-'}")
        if model.constructor:
            print(f"  made by {model.constructor}")
        if model.publisher:
            verb = "loading in" if model.state == "loading" else "published by"
            stopped = ", which is stopped" if _stopped(model.publisher[0]) else ""
            print(f"  {verb} process {model.publisher[0]} ({model.publisher[1]}){stopped}")
        for holder in model.holders:
            print(f"  held by process {holder.pid} ({holder.name}) for {_ago(holder.since)}{_cost(model, holder.pid)}")
        if model.reason:
            print(f"  {model.reason}")
    return 0


def _cost(model: StoredModel, pid: int) -> str:
    found = memory.cost(pid, model.file) if model.file else None
    if found is None:
        return ", which maps nothing of it, or cannot be looked into from here" if model.file else ""
    own = f", {_size(found.private)} of its own by writing" if found.private else ""
    return f": PSS {_size(found.pss)}{own}"


def put(store: Store, options: argparse.Namespace) -> int:
    module, _, function = options.constructor.partition(":")
    if not module or not function:
        message = f"{options.constructor!r}: MODULE:FUNCTION is expected, as in mypackage.models:load_t5"
        raise BadNameError(message)
    # Not at the top: it needs the extension, without which the command line shall still say what is wrong.
    from onecopy import _key, _verbs

    key = process.ModelKey.checked(options.tag, options.version)
    # Before anything of the user's is imported or called: both may take minutes.
    process.core_store(store.place).refuse(_key.of(key), store.place.backend, pin=True, replace=options.replace)
    constructor = _constructor(options.constructor, module, function)
    made_by = _key.describe(constructor)
    made = constructor()
    acquired = _verbs.publish(store.place, key, made, pin=True, replace=options.replace, made_by=made_by)
    generation = acquired.info.generation
    # The table shows the beginning of a long version.
    model = next(
        row
        for row in store.show(options.tag)
        if not row.unnamed and row.generation == generation and (key.version or "").startswith(row.version or "")
    )
    if options.json:
        return _json(_plain(model))
    remover = f"{program(options)} rm {shlex.quote(options.tag)}"
    print(f"published {_shown(options.tag)}: {_size(model.shared_bytes)}, pinned; `{remover}` removes it")
    return 0


def program(options: argparse.Namespace) -> str:
    """How this place is named at the command line."""
    words = ["onecopy"]
    if options.namespace != "default":
        words += ["--namespace", options.namespace]
    if options.directory is not None:
        words += ["--directory", options.directory]
    return shlex.join(words)


def _constructor(named: str, module: str, function: str) -> Any:
    """Raises BadNameError for what cannot be imported or called; what the user's own code raises is his to see."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        message = f"{named!r}: no module {module!r} (the current directory was looked into, too)"
        raise BadNameError(message) from None
    except AttributeError:
        message = f"{named!r}: module {module!r} has no {function!r}"
        raise BadNameError(message) from None
    if not callable(found):
        message = f"{named!r} is not callable"
        raise BadNameError(message)
    return found


def rm(store: Store, options: argparse.Namespace) -> int:
    rows = [row for row in store.list() if row.tag == options.tag and not row.unnamed]
    removed = store.remove(options.tag, version=options.version)
    if options.json:
        return _json({"removed": removed})
    print(f"removed the name '{_shown(options.tag)}' ({removed})")
    meant = [row for row in rows if options.version is None or options.version.startswith(row.version or "\0")]
    holders = {holder.pid for row in meant if row.state == "ready" for holder in row.holders}
    if holders:
        print(f"its memory is freed when the last of its {len(holders)} users leaves")
    for row in meant:
        if row.state == "loading" and row.publisher:
            print(f"process {row.publisher[0]} goes on loading, for itself; whoever asks next loads again")
    return 0


def sweep(store: Store, options: argparse.Namespace) -> int:
    rows = store.sweep(dry_run=options.dry_run)
    core = process.core_store(store.place)
    there = Path(core.path).exists()
    would_go = there and options.dry_run and _unused(store, core.path)
    removed_file = there and not options.dry_run and core.remove_registry_if_unused()
    if options.json:
        return _json(
            {
                "rows": [dict(zip(("kind", "what", "why"), row, strict=True)) for row in rows],
                "registry": removed_file or would_go,
            }
        )
    for kind, what, why in rows:
        print(f"{'would remove' if options.dry_run else 'removed'} {kind} {what}: {why}")
    if removed_file:
        print(f"removed {core.path}: nobody uses it")
    if would_go:
        print(f"would remove {core.path}: nobody uses it")
    if not rows and not removed_file and not would_go:
        print("nothing to remove")
    return 0


def _unused(store: Store, path: str) -> bool:
    """Whether a sweep would remove the registry's file: no model stays, and no living process is in the table.

    A process in the table has a lock on a byte of the file as long as it lives; any lock at all is somebody.
    """
    if any(model.state in ("ready", "loading") for model in store.list()):
        return False
    try:
        with Path(path).open("rb") as file:
            (kind,) = struct.unpack_from("h", fcntl.fcntl(file, fcntl.F_GETLK, machine.write_lock(0)))
    except OSError:
        return False
    return bool(kind == fcntl.F_UNLCK)


def verify(store: Store, options: argparse.Namespace) -> int:
    from onecopy import _verbs

    versions = _verbs.verify(store.place, process.ModelKey.checked(options.tag, options.version))
    if options.json:
        return _json({"bytes": sum(checked for _, checked in versions), "versions": dict(versions)})
    for version, checked in versions:
        named = f" version {version}" if version and version != options.version else ""
        print(f"{_shown(options.tag)}{named}: {checked} bytes agree with their checksums")
    return 0


def doctor(store: Store, options: argparse.Namespace) -> int:
    findings = machine.examine(store.place)
    if options.json:
        _json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            print(f"{'ok  ' if finding.good else 'LOOK'}  {finding.what}")
            if finding.remedy:
                print(f"      {finding.remedy}")
    return 0 if all(finding.good for finding in findings) else 1


def _plain(model: StoredModel, *, costs: bool = False) -> dict[str, Any]:
    """For a script. `costs`: with the bytes of each holder, null where they cannot be seen."""
    plain = asdict(model)
    plain["holders"] = [holder._asdict() for holder in model.holders]
    if costs:
        for holder in plain["holders"]:
            found = memory.cost(holder["pid"], model.file) if model.file else None
            holder["pss_bytes"], holder["private_bytes"] = (found.pss, found.private) if found else (None, None)
    return plain


def _json(value: Any) -> int:
    print(json.dumps(value, indent=2))
    return 0


def _shown(text: str) -> str:
    """On one line, whatever is in it."""
    return text if text.isprintable() else repr(text)[1:-1]


def _stopped(pid: int) -> bool:
    """State T of proc_pid_stat(5); False where it cannot be seen."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] in {"T", "t"}


def _state(model: StoredModel) -> str:
    marks = [mark for mark, on in (("pinned", model.pinned), ("unnamed", model.unnamed)) if on]
    return ", ".join([model.state, *marks])


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < UNIT or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= UNIT
    return ""


def _ago(since: float) -> str:
    seconds = max(0, int(time.time() - since))
    minutes, hours = seconds // 60, seconds // 3600
    return f"{hours} h" if hours else f"{minutes} min" if minutes else f"{seconds} s"
