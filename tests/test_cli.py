"""The command line, as the person on call uses it: every command in a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from processes import Other

import onecopy
from onecopy.cli import machine

MIB = 1 << 20


def run(namespace: str, *arguments: str, code: int = 0, cwd: Path | None = None) -> str:
    """What it prints; standard error where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "onecopy.cli", "--namespace", namespace, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done.stderr if code not in (0, 1) or not done.stdout else done.stdout


def files(namespace: str) -> list[str]:
    return sorted(path.name for path in Path("/dev/shm").glob(f"onecopy-v1-{os.geteuid()}-{namespace}*"))


def test_looking_makes_nothing(namespace):
    assert "no models" in run(namespace, "ls")
    assert json.loads(run(namespace, "ls", "--json")) == []
    assert "nothing to remove" in run(namespace, "sweep", "--dry-run")
    assert "nothing to remove" in run(namespace, "sweep")
    assert "no model 'none'" in run(namespace, "show", "none", code=3)
    assert files(namespace) == []


def test_what_is_there_and_who_has_it(namespace):
    with onecopy.Store(namespace).publish("arrays", [np.ones(MIB)], version="v1"):
        table = run(namespace, "ls")
        assert "arrays" in table
        assert "v1" in table
        assert "8.0 MiB" in table
        (model,) = json.loads(run(namespace, "show", "arrays", "--json"))
        (holder,) = model["holders"]
        assert (holder["pid"], holder["name"]) == (os.getpid(), Path("/proc/self/comm").read_text().strip())
        assert model["since"] <= holder["since"] <= time.time()
        assert model["shared_bytes"] == 8 * MIB
        assert f"held by process {os.getpid()}" in run(namespace, "show", "arrays")
        assert run(namespace, "verify", "arrays", "--version", "v1") == (
            f"arrays: {8 * MIB} bytes agree with their checksums\n"
        )
        assert json.loads(run(namespace, "rm", "arrays", "--json")) == {"removed": 1}
        assert "ready, unnamed" in run(namespace, "ls")
        run(namespace, "rm", "arrays", code=3)


@pytest.mark.parametrize("backend", ["memfd", "posix"])
def test_what_it_costs_each_process(namespace, backend):
    with Other() as publisher, Other() as attacher:
        publisher("publish", namespace, "t", backend=backend)
        (model,) = json.loads(run(namespace, "show", "t", "--json"))
        size = model["shared_bytes"]
        attacher("attach", namespace, "t")
        # Making huge pages of it, soon after publishing, takes the pages out of every page table until they are read again.
        for _ in range(50):
            assert publisher("total", "t") == attacher("total", "t")
            (model,) = json.loads(run(namespace, "show", "t", "--json"))
            costs = {holder["pid"]: holder for holder in model["holders"]}
            assert costs.keys() == {publisher.pid, attacher.pid}
            together = sum(cost["pss_bytes"] for cost in costs.values())
            assert together <= 1.01 * size + 8192  # header and skeleton are pages of the segment, too
            assert costs[attacher.pid]["private_bytes"] == 0
            if together >= size:
                break
        assert together >= size
        attacher("write_in_place", "t")
        said = run(namespace, "show", "t")
        assert re.search(rf"held by process {publisher.pid} \(.*\) for \d+ s: PSS \d", said)
        assert re.search(rf"process {attacher.pid} \(.*\) for \d+ s: PSS .*, \d+\.0 KiB of its own by writing", said)


def test_put_publishes_pinned_and_rm_frees(namespace, tmp_path):
    (tmp_path / "models.py").write_text("import numpy\ndef load():\n    return [numpy.ones(1 << 20)]\nnothing = 3\n")
    assert "published numbers: 8.0 MiB, pinned" in run(namespace, "put", "numbers", "models:load", cwd=tmp_path)
    assert "Pass --replace" in run(namespace, "put", "numbers", "models:load", code=1, cwd=tmp_path)
    again = run(namespace, "put", "numbers", "models:load", "--replace", "--json", cwd=tmp_path)
    assert json.loads(again)["generation"] == 2
    for wrong, why in (("models", "MODULE:FUNCTION"), ("nowhere:load", "no module"), ("models:lood", "has no"),
                       ("models:nothing", "not callable")):  # fmt: skip
        assert why in run(namespace, "put", "other", wrong, code=1, cwd=tmp_path)
    with onecopy.Store(namespace).attach("numbers") as (numbers,):
        assert numbers.sum() == MIB
    run(namespace, "rm", "numbers")


def test_put_says_no_before_it_calls_the_constructor(namespace, tmp_path):
    (tmp_path / "models.py").write_text(
        "import pathlib, numpy\npathlib.Path('imported').touch()\ndef load():\n    return [numpy.ones(1 << 20)]\n"
    )
    with onecopy.Store(namespace).publish("taken", [np.ones(MIB)]):
        for arguments, why in (
            (("taken", "models:load"), f"process {os.getpid()} .* has it. Pass --replace to supersede it"),
            (("new", "models:load", "--backend", "memfd"), "--backend posix or auto, not memfd"),
            (("x" * 256, "models:load"), "256 bytes"),
        ):
            said = run(namespace, "put", *arguments, code=1, cwd=tmp_path)
            assert re.search(why, said), said
            assert "pin=True" not in said
        assert not (tmp_path / "imported").exists()


def test_put_names_the_function_and_its_holder_is_not_another(namespace, tmp_path):
    (tmp_path / "models.py").write_text("import numpy\ndef load():\n    return [numpy.ones(1 << 20)]\n")
    run(namespace, "put", "numbers", "models:load", cwd=tmp_path)
    assert "made by models.load" in run(namespace, "show", "numbers")
    script = "import models, onecopy, sys; onecopy.Holder(models.load, 'numbers', store=onecopy.Store(sys.argv[1])).acquire()"
    done = subprocess.run([sys.executable, "-c", script, namespace], cwd=tmp_path, capture_output=True, check=True)
    assert done.stderr == b""
    run(namespace, "rm", "numbers")


def test_options_may_stand_after_the_command(namespace):
    with onecopy.Store(namespace).publish("arrays", [np.ones(MIB)]):
        for arguments in (["--namespace", namespace, "ls"], ["ls", "--namespace", namespace]):
            command = [sys.executable, "-m", "onecopy.cli", *arguments]
            assert "arrays" in subprocess.check_output(command, text=True)


def test_other_versions_are_named_and_all_are_verified(namespace):
    store = onecopy.Store(namespace)
    leases = [store.publish("arrays", [np.ones(MIB)], version=version) for version in ("v1", "v2")]
    said = run(namespace, "rm", "arrays", "--version", "v3", code=3)
    assert "no model 'arrays' (version 'v3')" in said
    assert "version 'v1', version 'v2'. Pass --version 'v1'" in said
    assert "--version 'v1'" in run(namespace, "verify", "arrays", "--version", "v3", code=3)
    assert run(namespace, "verify", "arrays").splitlines() == [
        f"arrays version {version}: {8 * MIB} bytes agree with their checksums" for version in ("v1", "v2")
    ]
    with pytest.raises(onecopy.errors.ModelNotFoundError, match=r"'arrays' without a version .* Pass version='v1'"):
        store.attach("arrays")
    for lease in leases:
        lease.release()


@pytest.mark.parametrize("backend", ["memfd", "posix"])
def test_sweep_tells_before_and_does_after(namespace, backend):
    other = Other()
    other("publish", namespace, "t", backend=backend)
    other.kill()
    other.close()
    before = files(namespace)
    would = run(namespace, "sweep", "--dry-run")
    assert "would remove process" in would
    assert "would remove segment 't': no living process holds it" in would
    assert "nobody uses it" in would
    assert files(namespace) == before
    done = run(namespace, "sweep")
    assert "removed segment 't': no living process holds it" in done
    assert "nobody uses it" in done
    assert files(namespace) == []


def test_a_segment_that_no_registry_knows(namespace):
    other = Other()
    other("publish", namespace, "t", backend="posix")
    (registry,) = [name for name in files(namespace) if name.endswith(namespace)]
    Path("/dev/shm", registry).unlink()
    # In use: whatever the tables say, it stays. So does a registry that a living process is in.
    assert "nothing to remove" in run(namespace, "sweep")
    other.kill()
    other.close()
    (segment,) = files(namespace)
    would = run(namespace, "sweep", "--dry-run")
    assert f"would remove orphan {segment} (" in would
    assert files(namespace) == [segment]
    assert f"removed orphan {segment} (" in run(namespace, "sweep")
    assert files(namespace) == []


def test_a_sweep_is_not_ended_by_who_reads_the_file(namespace):
    """To ask the kernel whether a file is in use is to be told by a signal when somebody opens it just then."""
    other = Other()
    other("publish", namespace, "t", backend="posix")
    for name in files(namespace):
        if name.endswith(namespace):
            Path("/dev/shm", name).unlink()
    other.kill()
    other.close()
    (segment,) = files(namespace)
    with Other() as sweeper:
        sweeper.start("sweep_often", namespace, 20_000)
        while not sweeper.answers(within=0):
            Path("/dev/shm", segment).open("rb").close()
        assert sweeper.result() == 20_000
    run(namespace, "sweep")
    assert files(namespace) == []


def test_looking_at_what_is_stale_clears_nothing_away(namespace):
    with Other() as other:
        other("publish", namespace, "t")
        other.kill()
    for command in (("verify", "t"), ("verify", "nothing"), ("doctor",)):
        said = run(namespace, *command, code=0 if command == ("doctor",) else 3)
        assert ("stale" in said) == (command == ("verify", "t")), said
        assert "t" in run(namespace, "ls")
    assert "would remove segment" in run(namespace, "sweep", "--dry-run")
    assert "rows and files of dead processes" in run(namespace, "doctor")
    run(namespace, "sweep")


def test_verify_waits_for_no_loader(namespace, tmp_path):
    gate = tmp_path / "gate"
    with Other() as loader:
        loader.start("acquire_gated", namespace, "t", str(tmp_path / "loads"), str(gate))
        while "loading" not in run(namespace, "ls"):
            pass
        assert f"process {loader.pid} " in run(namespace, "verify", "t", code=1)
        loader.signal(signal.SIGSTOP)
        while "which is stopped" not in run(namespace, "show", "t"):
            pass
        loader.signal(signal.SIGCONT)
        gate.touch()
        loader.result()
        said = run(namespace, "rm", "t")
        assert "its memory is freed when the last of its 1 users leaves" in said


def test_a_pinned_model_whose_file_is_gone_is_stale(namespace):
    onecopy.Store(namespace).publish("t", [np.ones(MIB)], pin=True).release()
    (segment,) = [name for name in files(namespace) if not name.endswith(namespace)]
    Path("/dev/shm", segment).unlink()
    assert "stale, pinned" in run(namespace, "ls")
    assert "its file is gone" in run(namespace, "show", "t")
    run(namespace, "rm", "t")


def test_remedies_name_this_place_and_text_stays_on_its_line(namespace, tmp_path):
    (tmp_path / "models.py").write_text("import numpy\ndef load():\n    return [numpy.ones(1 << 20)]\n")
    said = run(namespace, "put", "my\nmodel", "models:load", cwd=tmp_path)
    assert said.count("\n") == 2  # the line's own, and the one in the quoted command
    assert f"`onecopy --namespace {namespace} rm 'my\nmodel'`" in said
    assert r"my\nmodel" in run(namespace, "ls")
    assert f"`onecopy --namespace {namespace} ls`" in run(namespace, "show", "other", code=3)
    assert namespace in run(f"{namespace}-2", "ls")
    run(namespace, "rm", "my\nmodel")


def test_doctor(namespace):
    findings = json.loads(run(namespace, "doctor", "--json"))
    assert [finding["what"] for finding in findings if not finding["good"]] == []
    assert "ok    memfd_create works" in run(namespace, "doctor")


def test_doctor_looks_at_the_directory(namespace):
    home = Path(__file__).parent
    kind = machine.filesystem(str(home))
    if kind in machine.IN_MEMORY:
        pytest.skip("the checkout is in memory here")
    said = run(namespace, "--directory", str(home), "doctor", code=1)
    assert f"{home} is on {kind}, no tmpfs" in said
    assert "ONECOPY_DIR" in said


def test_doctor_reads_the_mount_that_is_on_top(monkeypatch):
    mounts = r"""1 0 0:1 / / rw - ext4 /dev/sda rw
2 1 0:2 / /dev rw - devtmpfs none rw
3 2 0:3 / /dev/a\040b rw shared:1 - tmpfs none rw
4 2 0:4 / /dev/a\040b rw - xfs none rw"""
    monkeypatch.setattr(machine, "_read", lambda _: mounts)
    found = [machine.filesystem(path) for path in ("/", "/home", "/dev/null", "/dev/a b/c")]
    assert found == ["ext4", "ext4", "devtmpfs", "xfs"]


def test_the_command_line_is_checked(namespace):
    assert "invalid choice" in run(namespace, "publish", code=2)
    assert "backend" in run(namespace, "put", "t", "m:f", "--backend", "tcp", code=2)
    assert "namespace 'a/b'" in run("a/b", "ls", code=1)
