"""What one process that attaches goes through; two of them a round for each peer.

The first predicts: attach, first inference, steady ones, letting go. The second reads one number of every page of the
weights, twice: what the first reading takes longer is the pages' cost, told apart from the arithmetic's noise.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from children import Child, as_if_never_forked, have_free_pages
from company import Cannot, assembled, by_rounds, companies
from machine import rollup, status, touch_segment
from peers import ALL, OURS
from peers.ours import HUGE
from peers.peer import Peer
from rounds import ROUNDS
from shapes import BERT, T5, Shape, every_page, read

STEADY = 3
#: Bytes from which one round must do.
LARGE = 4 << 30
FOR_ACTIVATIONS = 64 << 20


@dataclass
class Measured:
    """Seconds, a number a round."""

    attach: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    steady: list[float] = field(default_factory=list)
    #: What the first reading of the pages took longer than the second.
    pages: list[float] = field(default_factory=list)
    release: list[float] = field(default_factory=list)
    #: Bytes.
    anonymous: list[int] = field(default_factory=list)
    page_tables: list[int] = field(default_factory=list)
    #: Of the weights, mapped by huge pages.
    huge: list[int] = field(default_factory=list)
    #: Whether it answers bit by bit what the others do.
    exact: bool = True
    #: Of ours: what opening, mapping and touching the same memory takes without anything else.
    limit: list[float] = field(default_factory=list)
    #: Of a peer: who shared memory and rounds with it, and ours of the same rounds.
    company: str = ""
    ours: Measured | None = None

    def add(self, other: Measured) -> None:
        """The rounds of another company."""
        for mine in fields(self):
            if isinstance(values := getattr(self, mine.name), list):
                values += getattr(other, mine.name)
        self.exact &= other.exact


@dataclass
class Seen:
    output: Any
    #: Whether all weights begin at multiples of 64. Where they do not, matrix products add up in another order.
    aligned: bool

    def same_as(self, other: Seen) -> bool:
        return bool((self.output == other.output).all())

    def close_to(self, other: Seen) -> bool:
        off = abs(self.output - other.output).max()
        return not self.aligned and bool(off <= 1e-4 * abs(other.output).max())


def predicting(peer: Peer, shape: Shape, folder: Path, ticket: Any) -> Iterator[Any]:
    if not peer.inherits:
        as_if_never_forked()
    peer.ready(ticket)
    anonymous, page_tables = rollup("Anonymous"), status("VmPTE")
    yield None
    peer.prepare(shape, folder)
    have_free_pages(int(shape.size * peer.own) + FOR_ACTIVATIONS)
    begun = time.perf_counter()
    model = peer.attach(shape, folder, ticket)
    attached = time.perf_counter()
    seen = shape.predict(model)
    first = time.perf_counter()
    aligned = not peer.maps or all(weight.data_ptr() % 64 == 0 for weight in model.parameters())
    steady = []
    for _ in range(STEADY):
        start = time.perf_counter()
        shape.predict(model)
        steady.append(time.perf_counter() - start)
    took = peer.took(attached - begun)
    memory = rollup("Anonymous") - anonymous, status("VmPTE") - page_tables, rollup(HUGE)
    released = None
    if not peer.inherits and peer.maps:
        gone = weakref.ref(model)
        start = time.perf_counter()
        peer.let_go()
        del model
        if gone() is not None:
            gc.collect()
        released = time.perf_counter() - start
        assert gone() is None, gc.get_referrers(gone())
    times = took, first - attached, statistics.median(steady), released
    yield times, memory, Seen(seen.numpy(), aligned)
    peer.left()


def reading(peer: Peer, shape: Shape, folder: Path, ticket: Any) -> Iterator[Any]:
    if not peer.inherits:
        as_if_never_forked()
    peer.ready(ticket)
    yield None
    peer.prepare(shape, folder)
    have_free_pages(int(shape.size * peer.own) + FOR_ACTIVATIONS)
    model = peer.attach(shape, folder, ticket)
    pages = every_page(model)
    spent = []
    for _ in range(3):
        start = time.perf_counter()
        read(pages)
        spent.append(time.perf_counter() - start)
    yield spent[0] - min(spent[1:])
    del model, pages
    peer.let_go()
    peer.left()


def mapping(holder: int) -> Iterator[Any]:
    """The limit: the segment as its holder has it, opened, mapped and touched."""
    as_if_never_forked()
    yield None
    start = time.perf_counter()
    touch_segment(holder)
    yield time.perf_counter() - start


@functools.cache
def measure(shape: Shape) -> dict[str, Measured | Cannot]:
    """By peer's name. Ours has the rounds of all companies."""
    found: dict[str, Measured | Cannot] = {}
    able = []
    for peer in ALL:
        if reason := peer.cannot(shape):
            found[peer.name] = Cannot(reason)
        else:
            able.append(peer)
    groups, not_at_all = companies(able, shape.size)
    found.update({peer.name: reason for peer, reason in not_at_all.items()})
    if groups:
        found[OURS.name] = everywhere = Measured()
    for group in groups:
        ours, names = Measured(), ", ".join(peer.name for peer in group if peer is not OURS)
        each = {peer.name: ours if peer is OURS else Measured(ours=ours, company=names) for peer in group}
        with assembled(group, shape) as served:
            outputs: dict[str, Seen] = {}
            # Many sizes and large ones, a few rounds each: a copy of gigabytes takes a peer seconds. What the pages cost is
            # asked for the real models.
            few = shape is not BERT
            for _, one in by_rounds(served, min(ROUNDS, 3 if shape.size < LARGE else 1) if few else ROUNDS):
                seen = once(one, shape, each[one.peer.name], read=shape in (BERT, T5))
                if one.peer is OURS:
                    with Child(mapping, one.putter.pid) as child:
                        child()
                        ours.limit.append(child())
                outputs.setdefault(one.peer.name, seen)
                assert seen.same_as(outputs[one.peer.name]) or not seen.aligned
        for name, seen in outputs.items():
            each[name].exact = seen.same_as(outputs[OURS.name])
            assert each[name].exact or seen.close_to(outputs[OURS.name]), (
                f"{name} answers something else on {shape.name}"
            )
        everywhere.add(each.pop(OURS.name))
        found.update(each)
    return found


def once(one: Any, shape: Shape, into: Measured, *, read: bool) -> Any:
    """Both processes (the second where the pages are `read`); what the first predicted."""
    child, ticket = one.hatch(predicting, shape)
    with child:
        child()
        (attach, first, steady, released), (anonymous, page_tables, huge), seen = child()
    into.attach.append(attach + ticket)
    into.first.append(first)
    into.steady.append(steady)
    into.anonymous.append(anonymous)
    into.page_tables.append(page_tables)
    into.huge.append(huge)
    if released is not None:
        into.release.append(released)
    if read and one.peer.maps:
        child, _ = one.hatch(reading, shape)
        with child:
            child()
            into.pages.append(child())
    return seen
