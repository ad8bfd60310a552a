"""One construction and one object per process, one load per machine, whatever the other processes do."""

from __future__ import annotations

import functools
import gc
import logging
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import types
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import Failed, Other, wait_until
from tasks import Model, counted, loads

import onecopy
from onecopy.errors import BadNameError, ModelTimeoutError, RecursionInConstructorError, UnshareableError


def holder_of(namespace: str, log: str, tag: str = "model", **options: Any) -> onecopy.Holder[Model]:
    return onecopy.Holder(lambda: counted(log), tag, store=onecopy.Store(namespace), **options)


#: A program with a pool: in its children its own module is `__mp_main__`.
SPAWNING = """
import multiprocessing, sys
sys.path.insert(0, sys.argv[1])
import onecopy
from tasks import counted

def good():
    return counted(sys.argv[3])

def role(holder):
    with holder:
        return holder.info.role

if __name__ == "__main__":
    holder = onecopy.Holder(good, "model", store=onecopy.Store(sys.argv[2]))
    with holder, multiprocessing.get_context("spawn").Pool(1) as pool:
        print(holder.info.role, pool.apply(role, (holder,)))
        pool.close()
        pool.join()
"""


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


class TestOneProcess:
    def test_holders_and_threads_share_one_object_and_one_construction(self, namespace, log):
        holders = [holder_of(namespace, log) for _ in range(16)]
        models: list[Model] = []
        threads = [threading.Thread(target=lambda holder=holder: models.append(holder.acquire())) for holder in holders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({id(model) for model in models}) == 1
        assert loads(log) == 1

    def test_a_held_object_is_found_again_after_release(self, namespace, log):
        holder = holder_of(namespace, log)
        model = holder.acquire()
        holder.release()
        holder.release()
        assert holder.info is None
        assert holder_of(namespace, log).acquire() is model

    def test_a_model_works_after_release_and_after_its_holder(self, namespace, log):
        with holder_of(namespace, log) as model:
            pass
        gc.collect()
        assert model.total() == (4 << 20) / 8

    def test_the_last_user_frees_it_and_the_next_acquire_loads(self, namespace, log):
        with holder_of(namespace, log) as model:
            assert model.total() > 0
        del model
        gc.collect()
        wait_until(lambda: not onecopy.Store(namespace).list())
        holder_of(namespace, log).acquire()
        assert loads(log) == 2

    def test_linger_keeps_the_weights(self, namespace, log):
        with holder_of(namespace, log, linger=3.0) as model:
            value = model.total()
        del model
        gc.collect()
        assert holder_of(namespace, log).acquire().total() == value
        assert loads(log) == 1

    def test_a_holder_is_cheap_and_picklable(self, namespace):
        holder = onecopy.Holder(dict, "model", version="7", store=onecopy.Store(namespace), timeout=3.0, linger=1.0)
        again = pickle.loads(pickle.dumps(holder))
        assert repr(again) == repr(holder)
        assert again.acquire() == {}

    @pytest.mark.parametrize("made", [None, {}, {"weights": 1}, [1, 2], "text"])
    def test_a_small_result_is_private_and_nobody_is_warned(self, namespace, made, caplog):
        holder = onecopy.Holder(lambda: made, "model", store=onecopy.Store(namespace))
        assert holder.acquire() == made
        assert holder.info.role == "private"
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    def test_a_dict_of_arrays_is_shared(self, namespace):
        holder = onecopy.Holder(lambda: {"w": np.ones((512, 1024))}, "model", store=onecopy.Store(namespace))
        assert holder.acquire()["w"].sum() == 512 * 1024
        assert holder.info.role == "publisher"
        assert holder.info.shared_bytes >= 512 * 1024 * 8

    def test_another_constructor_in_this_process_is_named_once(self, namespace, log, caplog):
        store = onecopy.Store(namespace)

        def first() -> Model:
            return counted(log)

        def second() -> Model:
            return counted(log, 2.0)

        holder = onecopy.Holder(first, "model", store=store)
        model = holder.acquire()
        again = types.FunctionType(first.__code__.replace(co_firstlineno=1), globals(), closure=first.__closure__)
        again.__qualname__ = first.__qualname__
        for same in (first, functools.partial(first), again):
            assert onecopy.Holder(same, "model", store=store).acquire() is model
        assert warnings(caplog) == []
        for _ in range(2):
            assert onecopy.Holder(second, "model", store=store).acquire() is model
        (warning,) = warnings(caplog)
        assert re.search(r"'model' was made by \S+\.first, and is asked for with \S+\.second:", warning)
        assert loads(log) == 1

    def test_a_constructor_is_not_kept(self, namespace, log):
        def constructor() -> Model:
            return counted(log)

        holder = onecopy.Holder(constructor, "model", store=onecopy.Store(namespace))
        model = holder.acquire()
        gone = weakref.ref(constructor)
        del constructor, holder
        gc.collect()
        assert gone() is None
        assert model.total() > 0

    def test_its_own_tag_inside_its_constructor_raises(self, namespace):
        holder = onecopy.Holder(lambda: holder.acquire(), "model", store=onecopy.Store(namespace))  # noqa: PLW0108
        with pytest.raises(RecursionInConstructorError, match="asked for 'model' itself"):
            holder.acquire()

    def test_a_constructors_own_exception_reaches_its_caller(self, namespace):
        def constructor() -> None:
            raise LookupError("no such checkpoint")

        holder = onecopy.Holder(constructor, "model", store=onecopy.Store(namespace))
        for _ in range(3):
            with pytest.raises(LookupError, match="no such checkpoint"):
                holder.acquire()
        assert onecopy.Holder(lambda: 7, "model", store=onecopy.Store(namespace)).acquire() == 7

    def test_what_cannot_be_pickled_is_private_with_one_warning(self, namespace, caplog):
        def constructor() -> list[Any]:
            return [threading.Lock(), np.ones(1 << 20)]

        holder = onecopy.Holder(constructor, "model", store=onecopy.Store(namespace))
        holder.acquire()
        holder.release()
        holder.acquire()
        (warning,) = warnings(caplog)
        assert "lock" in warning
        assert "lock" in holder.info.reason

    def test_on_unshareable_raise(self, namespace):
        holder = onecopy.Holder(
            lambda: [threading.Lock(), np.ones(1 << 20)],
            "model",
            store=onecopy.Store(namespace),
            on_unshareable="raise",
        )
        with pytest.raises(UnshareableError, match="lock"):
            holder.acquire()

    @pytest.mark.parametrize("how", ["ctrl-c", "signal handler"])
    def test_ctrl_c_at_the_worst_moment_leaves_no_lock_behind(self, namespace, how):
        """Between taking the slot's lock and noting it."""
        import inspect
        import sys

        from onecopy import process

        lines, first = inspect.getsourcelines(process.Slot.entered)
        worst = first + next(number for number, line in enumerate(lines) if "self._inside = True" in line)

        def acquire() -> Any:
            made = onecopy.Holder(
                lambda: {"w": np.ones(1 << 18)}, "model", store=onecopy.Store(namespace), timeout=60.0
            )
            return made.acquire()

        def tracer(frame: Any, event: str, arg: object) -> Any:
            if event == "line" and frame.f_lineno == worst and frame.f_code.co_filename == process.__file__:
                sys.settrace(None)
                if how == "ctrl-c":
                    raise KeyboardInterrupt
                acquire()
            return tracer

        sys.settrace(tracer)
        try:
            if how == "ctrl-c":
                with pytest.raises(KeyboardInterrupt):
                    acquire()
            else:
                acquire()
        finally:
            sys.settrace(None)
        other: list[object] = []
        thread = threading.Thread(target=lambda: other.append(acquire()))
        thread.start()
        thread.join()
        assert len(other) == 1

    def test_a_tag_that_is_removed_again_and_again_while_it_loads(self, namespace):
        store = onecopy.Store(namespace)
        made = []

        def constructor() -> dict[str, Any]:
            made.append(1)
            store.remove("model")
            return {"w": np.ones(1 << 18)}

        holder = onecopy.Holder(constructor, "model", store=store)
        assert holder.acquire()["w"].sum() == 1 << 18
        assert len(made) == 3
        assert "removed 3 times" in holder.info.reason

    @pytest.mark.parametrize("tag", ["", "x" * 256, "nul\0"])
    def test_a_tag_that_cannot_be_used(self, namespace, tag):
        with pytest.raises(BadNameError, match="255") as told:
            onecopy.Holder(dict, tag, store=onecopy.Store(namespace))
        assert ("`version`" in str(told.value)) == (len(tag) > 255)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"tag": 5}, "tag must be a str, not 5"),
            ({"version": 1}, "version must be a str, not 1"),
            ({"constructor": [1]}, "constructor must be a function that makes the model, not a list"),
            ({"timeout": "5"}, "timeout must be seconds, 0 or more, or None, not '5'"),
            ({"linger": "long"}, "linger must be seconds, 0 or more, or None, not 'long'"),
        ],
    )
    def test_an_argument_of_another_kind(self, arguments, words):
        with pytest.raises(TypeError, match=words):
            onecopy.Holder(**{"constructor": dict, "tag": "model", **arguments})

    @pytest.mark.parametrize("verb", ["attach", "show", "verify", "remove", "publish", "acquire"])
    def test_a_verb_with_a_tag_of_another_kind(self, namespace, verb):
        verb_of = getattr(onecopy.Store(namespace), verb)
        with pytest.raises(TypeError, match="tag must be a str, not 5"):
            verb_of(5, *{"publish": [{}], "acquire": [dict]}.get(verb, []))

    def test_a_line_break_in_a_tag_is_none_in_a_message(self, namespace, caplog):
        holder = onecopy.Holder(lambda: [threading.Lock(), np.ones(1 << 20)], "a\nb", store=onecopy.Store(namespace))
        with caplog.at_level(logging.INFO, "onecopy"):
            holder.acquire()
        assert caplog.messages
        assert all("\n" not in message for message in caplog.messages)
        assert "'a\\nb' is not shared" in warnings(caplog)[0]

    def test_a_tag_that_is_not_utf8(self, namespace):
        with pytest.raises(BadNameError, match="UTF-8"):
            onecopy.Holder(dict, "t5 \udcff", store=onecopy.Store(namespace)).acquire()

    @pytest.mark.parametrize("tag", ["/models/t5", "../../etc/passwd", "t5 größe 模型", "x" * 255])
    def test_a_tag_is_never_a_path(self, namespace, log, tag):
        with holder_of(namespace, log, tag) as held:
            assert held.total() > 0
        assert [model.tag for model in onecopy.Store(namespace).list()] == [tag]

    def test_a_namespace_that_would_be_a_path(self):
        with pytest.raises(BadNameError, match="namespace"):
            onecopy.Store("../x")


class TestSeveralProcesses:
    def test_one_load_among_eight_that_start_together(self, namespace, log):
        others = [Other() for _ in range(8)]
        for other in others:
            other.start("acquire", namespace, "model", log, seconds=0.3)
        answers = [other.result() for other in others]
        assert len({total for total, *_ in answers}) == 1
        assert sorted(role for _, role, *_ in answers) == ["attacher"] * 7 + ["publisher"]
        assert loads(log) == 1
        for other in others:
            other.close()
        wait_until(lambda: not onecopy.Store(namespace).list())

    @pytest.mark.parametrize("backend", ["memfd", "posix"])
    def test_the_weights_are_there_once(self, namespace, log, backend):
        mib = 64
        with Other() as one, Other() as two, Other() as three, Other() as four:
            others = [one, two, three, four]
            for other in others:
                assert other("acquire", namespace, "model", log, mib=mib, backend=backend)[2] == backend
            mapped = 0
            # While pages are made huge, they leave the page tables for a moment: touched again, they are back.
            while mapped < 0.9 * (mib << 20):
                for other in others:
                    other("total", "model")
                seen = [other("memory") for other in others]
                mapped = sum(memory["Pss"] for memory in seen)
                assert mapped <= 1.01 * (mib << 20)
            assert all(memory["Anonymous"] <= 1 << 20 for memory in seen)

    @pytest.mark.parametrize("backend", ["memfd", "posix"])
    def test_a_write_in_place_reaches_nobody(self, namespace, log, backend):
        with Other() as one, Other() as two:
            before = one("acquire", namespace, "model", log, backend=backend)[0]
            two("acquire", namespace, "model", log, backend=backend)
            assert two("write_in_place", "model") != before
            assert one("total", "model") == before
            with Other() as three:
                assert three("acquire", namespace, "model", log, backend=backend)[0] == before

    @pytest.mark.parametrize("backend", ["memfd", "posix"])
    def test_the_publisher_is_killed_and_nobody_notices(self, namespace, log, backend):
        with Other() as one, Other() as two, Other() as three:
            value = one("acquire", namespace, "model", log, backend=backend)[0]
            two("acquire", namespace, "model", log, backend=backend)
            one.kill()
            assert three("acquire", namespace, "model", log, backend=backend)[:2] == (value, "attacher")
            assert two("total", "model") == value
            assert loads(log) == 1

    @pytest.mark.parametrize("backend", ["memfd", "posix"])
    def test_all_are_killed_and_the_next_one_loads(self, namespace, log, backend):
        one, two = Other(), Other()
        one("acquire", namespace, "model", log, backend=backend)
        two("acquire", namespace, "model", log, backend=backend)
        one.kill()
        two.kill()
        one.close()
        two.close()
        with Other() as three:
            assert three("acquire", namespace, "model", log, backend=backend)[1] == "publisher"
            assert loads(log) == 2
            assert len(onecopy.Store(namespace).list()) == 1

    def test_a_loader_is_killed_and_a_waiter_takes_over(self, namespace, log):
        with Other() as one, Other() as two, Other() as three:
            one.start("acquire", namespace, "model", log, seconds=600.0)
            wait_until(lambda: loads(log) == 1)
            two.start("acquire", namespace, "model", log)
            three.start("acquire", namespace, "model", log)
            time.sleep(0.2)
            one.kill()
            assert {two.result()[1], three.result()[1]} == {"publisher", "attacher"}
            assert loads(log) == 2

    def test_a_timeout_names_the_loader(self, namespace, log):
        with Other() as one:
            one.start("acquire", namespace, "model", log, seconds=600.0)
            wait_until(lambda: loads(log) == 1)
            with pytest.raises(ModelTimeoutError, match=f"process {one.pid} .* has been loading it for"):
                holder_of(namespace, log, timeout=0.2).acquire()
            one.kill()

    def test_a_stopped_loader_is_waited_for_no_longer(self, namespace, log, caplog):
        with Other() as one:
            one.start("acquire", namespace, "model", log, seconds=600.0)
            wait_until(lambda: loads(log) == 1)
            one.signal(signal.SIGSTOP)
            holder = holder_of(namespace, log)
            assert holder.acquire().total() > 0
            assert "is stopped" in holder.info.reason
            one.kill()

    def test_a_failing_constructor_is_tried_twice_and_then_everyone_goes_alone(self, namespace, log):
        others = [Other() for _ in range(4)]
        for other in others:
            other.start("fails", namespace, "model", log, seconds=0.5)
        # Each caller sees its constructor's own exception, and nobody waits for ever.
        assert [other.result() for other in others] == ["no such checkpoint"] * 4
        for other in others:
            other.close()

    def test_what_cannot_be_rebuilt_here_is_loaded_here(self, namespace):
        with Other() as one, Other(ONECOPY_TEST_BROKEN="1") as two:
            assert one("broken", namespace, "model")[0] == "publisher"
            role, reason = two("broken", namespace, "model")
            assert role == "private"
            assert "Broken" in reason
            assert "class Broken cannot live here" in two.close()

    def test_another_constructor_under_the_tag_is_named(self, namespace, log, caplog):
        with Other() as one:
            one("acquire", namespace, "model", log)
            for _ in range(2):
                holder_of(namespace, log).acquire()
            assert loads(log) == 1
            (warning,) = warnings(caplog)
            assert "'model' was made by tasks.acquire.<locals>.<lambda>" in warning
            assert "asked for with test_holder.holder_of.<locals>.<lambda>" in warning

    def test_what_was_published_has_no_constructor_that_could_be_another(self, namespace, log, caplog):
        with Other() as one:
            one("publish", namespace, "model")
            assert onecopy.Store(namespace).show("model")[0].constructor == ""
            holder = holder_of(namespace, log)
            holder.acquire()
            assert holder.info.role == "attacher"
        assert holder_of(namespace, log).acquire() is holder.acquire()
        assert warnings(caplog) == []

    def test_a_spawned_child_has_the_constructor_of_its_parent(self, namespace, log, tmp_path):
        script = tmp_path / "script.py"
        script.write_text(SPAWNING)
        command = [sys.executable, str(script), str(Path(__file__).parent), namespace, log]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["publisher", "attacher"]
        assert done.stderr == ""

    def test_who_learns_that_it_is_too_small_is_told_why_quietly(self, namespace, log):
        with Other() as one, Other() as two:
            assert one("small", namespace, "model") == ("private", two("small", namespace, "model")[1])
            assert "not worth a segment" in two("small", namespace, "model")[1]
            assert two.close() == one.close() == ""

    def test_versions_are_different_models(self, namespace, log):
        with Other() as one, Other() as two:
            assert one("acquire", namespace, "model", log, value=1.0, version="1")[1] == "publisher"
            assert two("acquire", namespace, "model", log, value=2.0, version="2")[1] == "publisher"
            assert one("total", "model") * 2 == two("total", "model")

    def test_closed_descriptors_cost_nobody_the_model(self, namespace, log):
        with Other() as one, Other() as two, Other() as three:
            value = one("acquire", namespace, "model", log)[0]
            two("acquire", namespace, "model", log)
            one("close_descriptors")
            assert one("total", "model") == value
            assert three("acquire", namespace, "model", log)[:2] == (value, "attacher")
            one("release", "model")
            assert one("acquire", namespace, "other", log)[1] == "publisher"

    def test_a_forked_child_keeps_the_model_for_others(self, namespace, log):
        with Other() as one:
            value = one("acquire", namespace, "model", log)[0]
            assert one("fork_and_total", "model") == (value, 0)
            child = one("fork_and_leave", "model")
            one.kill()
            try:
                with Other() as two:
                    assert two("acquire", namespace, "model", log)[:2] == (value, "attacher")
                assert loads(log) == 1
            finally:
                kill_and_forget(child)

    def test_ctrl_c_ends_the_wait(self, namespace, log):
        with Other() as one, Other() as two:
            one.start("acquire", namespace, "model", log, seconds=600.0)
            wait_until(lambda: loads(log) == 1)
            two.start("acquire", namespace, "model", log)
            # Python drops an interrupt that comes in the middle of a finalizer: a person presses the keys again, too.
            while not two.answers(within=0.5):
                two.signal(signal.SIGINT)
            with pytest.raises(Failed, match="KeyboardInterrupt"):
                two.result()
            one.kill()

    def test_ctrl_c_in_a_constructor_lets_the_next_one_load(self, namespace, log):
        with Other() as one, Other() as two:
            one.start("acquire", namespace, "model", log, seconds=600.0)
            wait_until(lambda: loads(log) == 1)
            two.start("acquire", namespace, "model", log)
            one.signal(signal.SIGINT)
            with pytest.raises(Failed, match="KeyboardInterrupt"):
                one.result()
            assert two.result()[1] == "publisher"


def kill_and_forget(pid: int) -> None:
    import os

    os.kill(pid, signal.SIGKILL)
    # Not our child: gone when its place in /proc is, or when init has not looked yet, a zombie.
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or ") Z " in Path(f"/proc/{pid}/stat").read_text())
