"""Bytes of a segment and of a registry, read and forged from docs/format.md alone, checksums included.

Not a line of it is the product's: where this and the product agree, the document is right.
"""

from __future__ import annotations

import fcntl
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NONE = 2**32 - 1
F_OFD_SETLKW = 38
U64 = 2**64 - 1

HEADER = struct.Struct("=8sII16sQQQQQQQQII")
HEADER_FIELDS = [
    "magic",
    "version",
    "header_crc",
    "uuid",
    "total_bytes",
    "manifest_offset",
    "buffer_count",
    "skeleton_offset",
    "skeleton_bytes",
    "data_offset",
    "data_bytes",
    "huge_bytes",
    "manifest_crc",
    "skeleton_crc",
]
BUFFER = struct.Struct("=QQII")

STAMP = struct.Struct("=8sII16s28sI")
COMMITTED, APPLIED = 64, 72
REDO = 7_262_208
LENGTH = 14_778_368

#: Number, offset, fields and format of a table.
TABLES: dict[str, tuple[int, int, str, str]] = {
    "heads": (
        0,
        128,
        "=QIIIIIIII",
        "serial leases_free leases_high segments_free segments_high entries_free entries_high processes swept",
    ),
    "buckets": (2, 8_192, "=I", "first"),
    "processes": (3, 16_384, "=QQQII16s", "generation namespace start pid state name"),
    "leases": (4, 69_632, "=QQIIiIIIQ", "owner_generation serial owner_slot segment fd previous next state reserved"),
    "segments": (
        5,
        921_600,
        "=16sQQQQQQQQIIIIIIII144s",
        (
            "uuid bytes device inode shared_bytes owner_generation code_hash since generation owner_slot state backend pinned "
            "entry previous next leases constructor"
        ),
    ),
    "entries": (
        6,
        3_051_520,
        "=16sQQQQQQQQQQIIIIIIII256s192s128s144s176s",
        (
            "hash loader_generation since generation episode attempt failed_episode oom_kills oom_since need code_hash state "
            "loader_slot failures oom_deaths current segments next word tag version compatibility constructor reason"
        ),
    ),
}


class Segment:
    """A named segment, opened for writing although its mode says 0400: the attacker is its owner."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.chmod(0o600)
        self.original = path.read_bytes()

    def header(self) -> dict[str, Any]:
        return dict(zip(HEADER_FIELDS, HEADER.unpack(self.original[: HEADER.size]), strict=True))

    def forge(
        self,
        *,
        rows: dict[int, dict[str, int]] | None = None,
        skeleton: bytes | None = None,
        honest: bool = True,
        **fields: Any,
    ) -> None:
        """Writes it anew, with these fields and buffer rows, and with a skeleton of the same length or a shorter one.

        `honest`: with checksums that fit.
        """
        content = bytearray(self.original)
        header = self.header()
        at, count = header["manifest_offset"], header["buffer_count"]
        for index, change in (rows or {}).items():
            place = at + index * BUFFER.size
            row = dict(zip(("offset", "bytes", "crc", "zero"), BUFFER.unpack_from(content, place), strict=True))
            BUFFER.pack_into(content, place, *{**row, **change}.values())
        manifest = bytes(content[at : at + count * BUFFER.size])
        start, length = header["skeleton_offset"], header["skeleton_bytes"]
        if skeleton is not None:
            assert len(skeleton) <= length, "there is room for what was there"
            # A pickle ends at its STOP: what follows is not read.
            content[start : start + length] = skeleton.ljust(length, b"\0")
        if honest:
            header["manifest_crc"] = zlib.crc32(manifest)
            header["skeleton_crc"] = zlib.crc32(content[start : start + length])
        header.update(fields)
        if honest:
            header["header_crc"] = 0
            header["header_crc"] = zlib.crc32(HEADER.pack(*header.values()))
        content[: HEADER.size] = HEADER.pack(*header.values())
        with self.path.open("r+b") as file:
            file.write(content)

    def skeleton(self) -> bytes:
        header = self.header()
        return self.original[header["skeleton_offset"] :][: header["skeleton_bytes"]]


class Registry:
    """A registry's file, changed behind everybody's back."""

    def __init__(self, folder: Path, namespace: str) -> None:
        self.path = folder / f"onecopy-v1-{os.geteuid()}-{namespace}"

    def read(self, at: int, length: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(at)
            return file.read(length)

    def write(self, at: int, content: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(at)
            file.write(content)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else is inside."""
        with self.path.open("r+b") as file:
            # l_type, l_whence, l_start, l_len, l_pid of struct flock, fcntl(2).
            fcntl.fcntl(file, F_OFD_SETLKW, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 2**40 - 1, 1, 0))
            yield

    def row(self, table: str, index: int = 0) -> dict[str, Any]:
        _, offset, form, fields = TABLES[table]
        size = struct.calcsize(form)
        values = struct.unpack(form, self.read(offset + index * (size + 4), size))
        return dict(zip(fields.split(), values, strict=True))

    def rows(self, table: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """Those in use."""
        heads = self.row("heads")
        high = heads["processes"] if table == "processes" else heads[f"{table}_high"]
        for index in range(high):
            row = self.row(table, index)
            if row["state"]:
                yield index, row

    def forge(self, table: str, index: int = 0, **changes: Any) -> None:
        number, offset, form, _ = TABLES[table]
        body = struct.pack(form, *{**self.row(table, index), **changes}.values())
        self.write(offset + index * (len(body) + 4), body + checksum(number, index, body))

    def entry(self, tag: str) -> int:
        return next(index for index, row in self.rows("entries") if text(row["tag"]) == tag)

    def bucket(self, entry: int) -> int:
        first: int = struct.unpack("=I", self.row("entries", entry)["hash"][:4])[0]
        return first % 1024

    def stamp(self, **changes: Any) -> None:
        fields = ("magic", "format", "layout", "uuid", "reserved", "checksum")
        row = {**dict(zip(fields, STAMP.unpack(self.read(0, 64)), strict=True)), **changes}
        body = STAMP.pack(*row.values())[:60]
        self.write(0, body + struct.pack("=I", zlib.crc32(body)))

    def counters(self) -> tuple[int, int]:
        committed, applied = struct.unpack("=QQ", self.read(COMMITTED, 16))
        return committed, applied

    def leave_undone(self, body: bytes, *, length: int | None = None) -> None:
        """As somebody who was killed after the flip: this record is still to be applied."""
        number = self.counters()[1] + 1
        sum_ = zlib.crc32(struct.pack("=Q", number) + body)
        self.write(REDO, struct.pack("=QII", number, len(body) if length is None else length, sum_) + body)
        self.write(COMMITTED, struct.pack("=Q", number))


def checksum(table: int, index: int, body: bytes) -> bytes:
    return struct.pack("=I", zlib.crc32(struct.pack("=II", table, index) + body))


def text(field: bytes) -> str:
    return field[1 : 1 + field[0]].decode()
