"""The README's Python runs as it stands there, and its links lead somewhere."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def test_the_nine_lines_run(tmp_path, request):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) == 9
    script = tmp_path / "readme.py"
    script.write_text(block, "utf-8")
    # It uses the default namespace: in a directory of its own nobody else does.
    directory = Path(tempfile.mkdtemp(prefix="onecopy-readme-", dir="/dev/shm"))
    request.addfinalizer(lambda: shutil.rmtree(directory))
    environment = {**os.environ, "ONECOPY_DIR": str(directory)}
    # The other terminal, while the first one waits for Enter.
    first = subprocess.Popen(
        [sys.executable, "-u", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert first.stdin is not None
    assert first.stdout is not None
    who, mean = first.stdout.readline().rstrip("\n"), first.stdout.readline()
    again = subprocess.check_output([sys.executable, script], input="\n", text=True, env=environment)
    assert again.startswith("who: attacher ")
    assert again.splitlines()[1] == mean.rstrip("\n")
    first.communicate("\n")
    assert first.returncode == 0
    role, shared = re.fullmatch(r"who: (\w+) MB shared: ([\d.]+)", who).groups()
    assert role == "publisher"
    assert float(shared) >= 50_000 * 384 * 8 / 1e6
    assert 0.49 < float(mean.removeprefix("mean: ")) < 0.51


def test_the_links_lead_to_files():
    links = re.findall(r"\]\(([^)#:]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_no_placeholder_is_left():
    assert not re.findall(r"^[A-Z]+$", README, re.MULTILINE)


def test_the_commands_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = set(re.findall(r"^    make ([a-z-]+)", README, re.MULTILINE))
    assert named
    assert named <= targets
