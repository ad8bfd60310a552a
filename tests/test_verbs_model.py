"""Any verbs in any order, in this process and two others of which one may be killed, against a model in plain memory.

The model is what docs/protocol.md says a person may expect; whatever is asked must be answered as it says, and what `list`
shows must become what it says (letting go is done by a thread).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import verbs
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule, run_state_machine_as_test
from processes import Forked

#: Stories, and steps in each. `make soak` tells more of them, and others every time.
EXAMPLES = int(os.environ.get("ONECOPY_MODEL_EXAMPLES", "30"))
STEPS = 25
TAGS = st.sampled_from(["a", "b"])
HERE = 0
PROCESSES = st.sampled_from([HERE, 1, 2])
VALUES = st.integers(1, 9).map(float)


@dataclass(eq=False)
class Content:
    """One generation of one tag."""

    tag: str
    value: float
    generation: int
    pinned: bool = False


@dataclass
class Expected:
    """What is there. A content is alive while it is held, or pinned and named."""

    named: dict[str, Content] = field(default_factory=dict)
    #: Leases by number: the process, and what it got.
    leases: dict[int, tuple[int, Content]] = field(default_factory=dict)
    #: Of each process and tag: what it would get again, while it has it.
    slots: dict[tuple[int, str], tuple[Content, set[int]]] = field(default_factory=dict)
    #: What a process has written in place, for as long as it has the mapping.
    written: dict[tuple[int, Content], float] = field(default_factory=dict)
    #: The last generation of a tag that something is left of.
    last: dict[str, int] = field(default_factory=dict)
    #: Tags whose rows may be there still, because their last holder was killed.
    residue: set[str] = field(default_factory=set)

    def holders(self, content: Content) -> set[int]:
        return {process for process, held in self.leases.values() if held is content}

    def alive(self) -> set[Content]:
        return {content for _, content in self.leases.values()} | set(self.named.values())

    def current(self, process: int, tag: str) -> Content | None:
        content, numbers = self.slots.get((process, tag), (None, set()))
        return content if numbers & self.leases.keys() else None

    def take(self, process: int, number: int, content: Content, *, fresh: bool = False) -> None:
        self.leases[number] = (process, content)
        if fresh or self.current(process, content.tag) is None:
            self.slots[process, content.tag] = (content, set())
        self.slots[process, content.tag][1].add(number)

    def publish(self, tag: str, value: float, generation: int, *, pinned: bool) -> Content:
        if tag in self.named:
            self.named[tag].pinned = False
        self.named[tag] = Content(tag, value, generation, pinned)
        self.last[tag] = generation
        return self.named[tag]

    def generations(self, tag: str) -> set[int]:
        """That the next content of a tag may have: numbers begin anew once nothing is left of it."""
        following = self.last.get(tag, 0) + 1
        if any(content.tag == tag for content in self.alive()):
            return {following}
        return {1, following} if tag in self.residue else {1}

    def seen(self, process: int, content: Content) -> float:
        return content.value + self.written.get((process, content), 0.0)

    def let_go(self, numbers: list[int], *, killed: bool = False) -> None:
        gone = {self.leases.pop(number)[1] for number in numbers}
        for content in gone:
            if killed:
                self.residue.add(content.tag)
            if self.named.get(content.tag) is content and not content.pinned and not self.holders(content):
                del self.named[content.tag]
        for process, content in list(self.written):
            if process not in self.holders(content):
                del self.written[process, content]


def machine(namespace: str, hatch: Callable[[], Forked]) -> type[RuleBasedStateMachine]:
    others: dict[int, Forked] = {}

    class Verbs(RuleBasedStateMachine):
        numbers = Bundle("numbers")
        patience = 20.0

        def __init__(self) -> None:
            super().__init__()
            self.expected = Expected()
            self.number = 0

        def ask(self, process: int, name: str, *args: Any) -> tuple[str, Any]:
            if process == HERE:
                return verbs.verb(name, *args)
            if process not in others:
                others[process] = hatch()
            answer: tuple[str, Any] = others[process]("verb", name, *args)
            return answer

        def pid(self, process: int) -> int:
            return os.getpid() if process == HERE else others[process].pid

        def next(self) -> int:
            self.number += 1
            return self.number

        @rule(target=numbers, process=PROCESSES, tag=TAGS, value=VALUES, with_holder=st.booleans())
        def acquire(self, *, process: int, tag: str, value: float, with_holder: bool) -> int:
            number, expected = self.next(), self.expected
            told, answer = self.ask(process, "acquire", namespace, number, tag, value, with_holder)
            assert told == "ok"
            seen, generation, role = answer
            content = expected.current(process, tag) or expected.named.get(tag)
            if content is None:
                assert (role, seen) == ("publisher", value)
                assert generation in expected.generations(tag)
                content = expected.publish(tag, value, generation, pinned=False)
            else:
                assert role in {"attacher", "publisher"}
            assert (seen, generation) == (expected.seen(process, content), content.generation)
            expected.take(process, number, content)
            return number

        @rule(target=numbers, process=PROCESSES, tag=TAGS)
        def attach(self, process: int, tag: str) -> int:
            number, expected = self.next(), self.expected
            told, answer = self.ask(process, "attach", namespace, number, tag)
            content = expected.current(process, tag) or expected.named.get(tag)
            if content is None:
                assert told == "ModelNotFoundError"
                return number
            assert told == "ok"
            assert answer[:2] == (expected.seen(process, content), content.generation)
            expected.take(process, number, content)
            return number

        @rule(
            target=numbers,
            process=PROCESSES,
            tag=TAGS,
            value=VALUES,
            replace=st.booleans(),
            pin=st.sampled_from([0, 0, 1]),
        )
        def publish(self, *, process: int, tag: str, value: float, replace: bool, pin: int) -> int:
            number, expected = self.next(), self.expected
            told, answer = self.ask(process, "publish", namespace, number, tag, value, replace, bool(pin))
            if tag in expected.named and not replace:
                assert told == "ModelExistsError"
                return number
            assert told == "ok"
            seen, generation, role = answer
            assert (seen, role) == (value, "publisher")
            assert generation in expected.generations(tag)
            expected.take(process, number, expected.publish(tag, value, generation, pinned=bool(pin)), fresh=True)
            return number

        @rule(number=consumes(numbers))
        def release(self, number: int) -> None:
            if number in self.expected.leases:
                assert self.ask(self.expected.leases[number][0], "release", number) == ("ok", None)
                self.expected.let_go([number])

        @rule(number=numbers)
        def read(self, number: int) -> None:
            if number in self.expected.leases:
                process, content = self.expected.leases[number]
                assert self.ask(process, "read", number) == ("ok", self.expected.seen(process, content))

        @rule(number=numbers, change=VALUES)
        def write_in_place(self, number: int, change: float) -> None:
            """Nobody else sees it; who asks again in the same process does."""
            if number in self.expected.leases:
                process, content = self.expected.leases[number]
                assert self.ask(process, "write", number, change) == ("ok", None)
                before = self.expected.written.get((process, content), 0.0)
                self.expected.written[process, content] = before + change

        @rule(process=PROCESSES, tag=TAGS)
        def remove(self, process: int, tag: str) -> None:
            told, count = self.ask(process, "remove", namespace, tag)
            content = self.expected.named.pop(tag, None)
            if content is not None:
                content.pinned = False
                assert (told, count) == ("ok", 1)
            else:
                known = [("ModelNotFoundError", None)] + [("ok", 1)] * (tag in self.expected.residue)
                assert (told, count) in known

        @rule(process=PROCESSES, dry_run=st.booleans())
        def sweep(self, *, process: int, dry_run: bool) -> None:
            assert self.ask(process, "sweep", namespace, dry_run) == ("ok", None)
            if not dry_run:
                self.expected.residue.clear()

        @rule(process=PROCESSES, tag=TAGS)
        def verify(self, process: int, tag: str) -> None:
            there = ("ok", 1 << 20) if tag in self.expected.named else ("ModelNotFoundError", None)
            assert self.ask(process, "verify", namespace, tag) == there

        @rule(process=PROCESSES, tag=TAGS)
        def show(self, process: int, tag: str) -> None:
            told, rows = self.ask(process, "listed", namespace, tag)
            wanted = [row for row in self.wanted() if row[0] == tag]
            if wanted:
                assert (told, rows) == ("ok", wanted)
            else:  # what only the dead have is shown, as stale, until somebody sweeps
                assert told == "ModelNotFoundError" or (tag in self.expected.residue and (told, rows) == ("ok", []))

        @rule(process=st.sampled_from([1, 2]))
        def killed(self, process: int) -> None:
            if process in others:
                others.pop(process).kill()
                mine = [number for number, (owner, _) in self.expected.leases.items() if owner == process]
                self.expected.let_go(mine, killed=True)

        @rule(process=st.sampled_from([1, 2]))
        def exits(self, process: int) -> None:
            if process in others:
                others.pop(process).end("exit_cleanly")
                mine = [number for number, (owner, _) in self.expected.leases.items() if owner == process]
                self.expected.let_go(mine)

        def wanted(self) -> list[tuple[str, int, bool, bool, list[int]]]:
            expected = self.expected
            return sorted(
                (
                    content.tag,
                    content.generation,
                    expected.named.get(content.tag) is not content,
                    content.pinned,
                    sorted(map(self.pid, expected.holders(content))),
                )
                for content in expected.alive()
            )

        @invariant()
        def what_is_listed(self) -> None:
            """In the end: what was let go of is unmapped by a thread. The bound is for hangs, and short once one was met."""
            wanted = ("ok", self.wanted())
            give_up = time.monotonic() + Verbs.patience
            while (told := verbs.verb("listed", namespace, None)) != wanted:
                if time.monotonic() > give_up:
                    Verbs.patience = 2.0
                    assert told == wanted
                time.sleep(0.001)

        def teardown(self) -> None:
            """Whatever went wrong: the next story begins with processes that hold nothing."""
            for process in (HERE, *others):
                self.ask(process, "release_all")
            for tag, _, _, pinned, _ in verbs.listed(namespace, None):
                if pinned:
                    verbs.remove(namespace, tag)
            self.expected = Expected()
            self.what_is_listed()
            verbs.verb("sweep", namespace, False)  # noqa: FBT003

    return Verbs


def test_any_verbs_in_any_order(namespace, hatch):
    bounds = settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        derandomize="ONECOPY_MODEL_EXAMPLES" not in os.environ,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine(namespace, hatch), settings=bounds)
