"""Who may import whom. Each door has its reason; the linters have no rule for one room of a package."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / "python" / "onecopy"
CORE = ROOT / "rust" / "core" / "src"
FRAMEWORKS = {"torch", "tensorflow", "keras", "jax", "sklearn", "apache_beam", "transformers", "scipy", "pandas"}


def imported(file: Path) -> Iterator[str]:
    """Every module that a file imports anywhere in it, by its full name."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: full names are found by searching"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def top(module: str) -> str:
    return module.partition(".")[0]


@pytest.mark.parametrize("room", ["beam", "cli"])
def test_beam_and_the_command_line_use_the_public_verbs(room):
    files = list((PYTHON / room).rglob("*.py"))
    assert files
    for file in files:
        core = [module for module in imported(file) if module.startswith("onecopy._core")]
        assert not core, (
            f"{file} imports {core}: it must be importable where the extension is missing; use store or process"
        )


def test_a_framework_file_knows_its_framework_and_numpy():
    files = [file for file in (PYTHON / "frameworks").glob("*.py") if file.stem != "__init__"]
    assert files
    for file in files:
        others = {top(module) for module in imported(file)} & FRAMEWORKS - set(file.stem.split("_"))
        assert not others, f"{file} imports {others}: one framework per file, so that the others need not be installed"


def test_importing_onecopy_loads_no_framework():
    script = "import json, sys, onecopy; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.check_output([sys.executable, "-c", script], text=True))
    assert {top(module) for module in loaded} & FRAMEWORKS == set()


def test_onecopy_beam_needs_no_extension():
    script = "import sys; sys.modules['onecopy._core'] = None; import onecopy.beam"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("room", "forbidden", "why"),
    [
        (
            "layout",
            r"crate::(sys|registry|segment|store)|\b(rustix|libc|std::(fs|os|net|process))::",
            "pure functions over bytes",
        ),
        ("registry", r"crate::(segment|store)\b", "who holds what does not depend on what is held"),
        ("segment", r"crate::(registry|store)\b", "one model's bytes do not depend on who holds them"),
        ("sys", r"crate::(layout|registry|segment|store)\b", "the system is below everything"),
    ],
)
def test_rooms_of_the_core(room, forbidden, why):
    files = list((CORE / room).rglob("*.rs"))
    assert files
    for file in files:
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
            code = line.partition("//")[0]
            assert not re.search(forbidden, code), f"{file}:{number}: {line.strip()}: {room} is {why}"


def test_the_doorway_uses_the_core_alone():
    manifest = (ROOT / "rust" / "python" / "Cargo.toml").read_text("utf-8")
    dependencies = manifest.partition("[dependencies]")[2].partition("\n[")[0]
    names = {
        re.split(r"[ .=]", line)[0] for line in dependencies.splitlines() if line.strip() and not line.startswith("#")
    }
    assert names == {"onecopy-core", "pyo3"}


def test_unsafe_only_where_it_belongs():
    doorway = ROOT / "rust" / "python" / "src"
    # pyo3 wants the slot of the buffer protocol beside the class: mapping.rs has that slot, buffer.rs what it does.
    # gil.rs: pyo3's way of letting go of the GIL does not survive the end of the interpreter.
    allowed = [CORE / "sys", doorway / "buffer.rs", doorway / "gil.rs", doorway / "mapping.rs"]
    for file in (ROOT / "rust").rglob("src/**/*.rs"):
        if not any(place == file or place in file.parents for place in allowed):
            text = "\n".join(line.partition("//")[0] for line in file.read_text("utf-8").splitlines())
            assert not re.search(r"\bunsafe\s*(\{|fn|impl)|allow\(unsafe_code\)", text), file
