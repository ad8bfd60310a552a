"""The verbs: publish, attach, replace, pin, remove, verify, sweep."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

import numpy as np
import pytest
from processes import Failed, Other
from tasks import Model

import onecopy
from onecopy.errors import (
    CorruptError,
    ModelExistsError,
    ModelNotFoundError,
    NoRoomError,
    UnshareableError,
    UntrustedError,
)


@pytest.fixture
def store(namespace: str) -> onecopy.Store:
    return onecopy.Store(namespace)


def registry(namespace: str) -> Path:
    return Path(f"/dev/shm/onecopy-v1-{os.geteuid()}-{namespace}")


def segments(namespace: str) -> list[str]:
    return [path.name for path in Path("/dev/shm").glob(f"{registry(namespace).name}-*")]


def test_publish_and_attach(store, namespace):
    with store.publish("model", Model(2.0)) as mine, Other() as other:
        assert other("attach", namespace, "model") == (mine.total(), 1)
        assert store.show("model")[0].state == "ready"
        assert len(store.show("model")[0].holders) == 2


def test_an_unknown_tag_raises_at_once(store):
    for verb in (store.attach, store.show, store.remove, store.verify):
        with pytest.raises(ModelNotFoundError, match="no model 'nothing'"):
            verb("nothing")


def test_publish_over_a_tag_says_who_has_it(store, namespace):
    with Other() as other:
        other("publish", namespace, "model", 1.0)
        with pytest.raises(ModelExistsError, match=f"process {other.pid} .*replace=True"):
            store.publish("model", Model(2.0))


def test_publish_over_a_tag_leaves_the_object_alone(store, namespace):
    class Watched(Model):
        def __reduce_ex__(self, protocol):
            raise AssertionError("taken apart")

    with Other() as other:
        other("publish", namespace, "model", 1.0)
        with pytest.raises(ModelExistsError):
            store.publish("model", Watched(2.0))


def test_a_replaced_generation_lives_until_its_last_lease(store, namespace):
    with Other() as old, Other() as new:
        value = old("publish", namespace, "model", 1.0)[0]
        lease = store.publish("model", Model(3.0), replace=True)
        assert lease.info.generation == 2
        assert new("attach", namespace, "model") == (3 * value, 2)
        assert old("total", "model") == value
        assert sorted((model.generation, model.unnamed) for model in store.list()) == [(1, True), (2, False)]
        old("release", "model")
        while len(store.list()) > 1:
            time.sleep(0.01)
        assert old("attach", namespace, "model") == (3 * value, 2)


def test_a_process_keeps_its_generation_while_it_has_the_object(store, namespace):
    first = store.publish("model", Model(1.0))
    with Other() as other:
        other("publish", namespace, "model", 3.0, replace=True)
        assert store.attach("model").object is first.object
        value = first.object.total()
        first.release()
        del first
        gc.collect()
        assert store.attach("model").object.total() == 3 * value


def test_remove_unnames_at_once_and_the_object_goes_on(store, namespace):
    lease = store.publish("model", Model(1.0))
    assert store.remove("model") == 1
    with pytest.raises(ModelNotFoundError):
        store.show("nothing")
    with Other() as other, pytest.raises(Exception, match="ModelNotFoundError"):
        other("attach", namespace, "model")
    assert lease.object.total() > 0


def test_remove_takes_the_version_that_was_asked_for(store, namespace):
    """However long: the table has room for the beginning of it."""
    versions = ["/models/" + "x" * 400 + end for end in "ab"]
    leases = [store.publish("model", Model(1.0), version=version) for version in versions]
    assert store.remove("model", version=versions[1]) == 1
    with Other() as other:
        assert other("attach_version", namespace, "model", versions[0])
        with pytest.raises(Failed, match="ModelNotFoundError"):
            other("attach_version", namespace, "model", versions[1])
    for lease in leases:
        lease.release()


def test_a_pinned_model_stays_without_holders(store, namespace):
    with Other() as other:
        value = other("publish", namespace, "model", 2.0, pin=True)[0]
        assert other.close() == ""
    assert len(segments(namespace)) == 1
    assert store.attach("model").object.total() == value
    assert store.show("model")[0].pinned
    gc.collect()
    store.remove("model")
    while segments(namespace):
        time.sleep(0.01)


def test_pin_needs_a_name(namespace):
    with pytest.raises(ValueError, match="posix"):
        onecopy.Store(namespace, backend="memfd").publish("model", Model(1.0), pin=True)


def test_use_after_release_is_told(store):
    lease = store.publish("model", Model(1.0))
    lease.release()
    lease.release()
    with pytest.raises(ValueError, match="was released"):
        _ = lease.object


def test_publish_of_what_cannot_be_shared_raises(store):
    with pytest.raises(UnshareableError, match="not worth a segment"):
        store.publish("model", {"small": 1})


def test_the_published_arrays_are_on_the_mapping(store):
    weights = np.arange(1 << 20, dtype=np.float32)
    lease = store.publish("model", {"weights": weights})
    shared = lease.object["weights"]
    assert np.array_equal(shared, weights)
    assert not np.shares_memory(shared, weights)
    while isinstance(shared.base, np.ndarray):
        shared = shared.base
    assert type(shared.base).__name__ == "Mapping"


@pytest.mark.parametrize("backend", ["memfd", "posix"])
def test_verify_counts_every_byte(namespace, backend):
    store = onecopy.Store(namespace, backend=backend)
    lease = store.publish("model", Model(1.0, mib=8))
    assert store.verify("model") == 8 << 20
    lease.release()


def test_verify_finds_a_flipped_bit_in_a_named_segment(namespace):
    store = onecopy.Store(namespace, backend="posix")
    lease = store.publish("model", Model(1.0, mib=8))
    (name,) = segments(namespace)
    path = Path("/dev/shm") / name
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(5 << 20)
        file.write(b"\xff")
    with pytest.raises(CorruptError, match="buffer checksum"):
        store.verify("model")
    lease.release()


@pytest.mark.parametrize(
    ("offset", "what"),
    [
        (0, "not a segment"),
        (8, "format version"),
        (60, "header checksum"),
        (4100, "manifest checksum"),
        (4200, "skeleton checksum"),
    ],
)
def test_nothing_is_unpickled_from_a_damaged_segment(namespace, offset, what):
    store = onecopy.Store(namespace, backend="posix")
    lease = store.publish("model", Model(1.0))
    (name,) = segments(namespace)
    path = Path("/dev/shm") / name
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\x7f")
    with Other() as other, pytest.raises(Exception, match=what):
        other("attach", namespace, "model")
    lease.release()


@pytest.mark.parametrize("damage", ["text", "short", "mode", "symlink", "directory"])
def test_a_registry_that_is_not_ours_is_named_and_not_used(namespace, damage, tmp_path, caplog):
    path = registry(namespace)
    try:
        if damage == "text":
            path.write_text("hello" * 2000)
            path.chmod(0o600)
        elif damage == "short":
            path.write_bytes(b"ONECOPY")
            path.chmod(0o600)
        elif damage == "mode":
            path.write_bytes(b"")
            path.chmod(0o666)
        elif damage == "symlink":
            (tmp_path / "target").write_bytes(b"")
            path.symlink_to(tmp_path / "target")
        else:
            path.mkdir()
        with pytest.raises((CorruptError, UntrustedError, OSError), match=str(path)):
            onecopy.Store(namespace).list()
        with pytest.raises((CorruptError, UntrustedError, OSError), match=str(path)):
            onecopy.Store(namespace).publish("model", Model(1.0))
        # Whoever has a constructor goes on without sharing, and is told why.
        holder = onecopy.Holder(lambda: Model(1.0), "model", store=onecopy.Store(namespace))
        assert holder.acquire().total() > 0
        (warning,) = caplog.messages
        assert str(path) in warning
        assert holder.info.role == "private"
    finally:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()


def test_no_room_is_told_with_figures_and_a_holder_goes_private(namespace, caplog, tmp_path):
    import resource

    class Small:
        """A file-size limit, as a stand-in for any that can be set here."""

        def __enter__(self) -> None:
            self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (32 << 20, self.before[1]))

        def __exit__(self, *_: object) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, self.before)

    store = onecopy.Store(namespace)
    store.list()
    with Small():
        with pytest.raises(NoRoomError, match=r"no room for \d+ bytes .*RLIMIT_FSIZE"):
            store.publish("model", Model(1.0, mib=64))
        holder = onecopy.Holder(lambda: Model(1.0, mib=64), "model", store=store)
        assert holder.acquire().total() > 0
        assert holder.info.role == "private"
        assert "RLIMIT_FSIZE" in holder.info.reason


def test_a_missing_directory_means_private(namespace, caplog):
    holder = onecopy.Holder(lambda: Model(1.0), "model", store=onecopy.Store(namespace, directory="/nowhere/at/all"))
    assert holder.acquire().total() > 0
    assert holder.info.role == "private"
    assert "open /nowhere/at/all: No such file or directory. Make that directory" in holder.info.reason
    assert "os error" not in holder.info.reason
    assert "Errno" not in holder.info.reason


def test_the_registry_file_may_vanish(store, namespace):
    with Other() as one, Other() as two:
        value = one("publish", namespace, "model", 1.0)[0]
        registry(namespace).unlink()
        # Whoever touches the registry next puts what it holds into the new one.
        one("publish", namespace, "second", 5.0)
        assert two("attach", namespace, "model") == (value, 1)


def test_sweep_says_what_the_dead_left(store, namespace):
    assert store.list() == []
    other = Other()
    other("publish", namespace, "model", 1.0, backend="posix")
    other.kill()
    other.close()
    dry = store.sweep(dry_run=True)
    assert any("model" in what or "segment" in kind for kind, what, _ in dry), dry
    store.sweep()
    assert segments(namespace) == []
    assert store.list() == []
