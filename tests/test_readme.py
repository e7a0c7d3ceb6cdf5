"""What README.md and the lab script say is so: their commands parse, their links lead somewhere, no program is missing."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPT = (ROOT / "info" / "lab_script.sh").read_text(encoding="utf-8")
PROGRAMS = sorted(file.stem for file in (ROOT / "programs").glob("emc_*.py"))


def commands(text: str) -> list[str]:
    """The lines of a shell script that begin with a program, indented ones too, with $name standing for a tilt series."""
    lines = re.findall(r"^\s*(emc_[a-z]+\b[^#>\n]*)", text, re.MULTILINE)
    return [re.sub(r"\$\{?name\}?", "TS_01", line) for line in lines]


def shell_blocks() -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_readme_shows_the_lab_script_as_it_is() -> None:
    assert SCRIPT in shell_blocks()


@pytest.mark.parametrize("command", commands(SCRIPT))
def test_commands_of_the_lab_script_parse(command: str) -> None:
    name, *words = shlex.split(command)
    importlib.import_module(name).program.parser().parse_all(words)


def test_the_lab_script_is_a_shell_script_with_commands_in_it() -> None:
    subprocess.run(["sh", "-n", str(ROOT / "info" / "lab_script.sh")], check=True)
    assert len(commands(SCRIPT)) == sum("emc_" in line for line in SCRIPT.splitlines()) >= 10


def test_commands_in_running_text_parse() -> None:
    found = re.findall(r"`(emc_[a-z]+ [^`\n]+)`", README + (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    assert len(found) >= 2
    for code in found:
        name, *words = shlex.split(code)
        if name != "emc_x":  # any of them
            importlib.import_module(name).program.parser().parse_all(words)


def test_every_program_is_in_the_table_and_no_other() -> None:
    assert sorted(re.findall(r"^\| `(emc_[a-z]+)` \|", README, re.MULTILINE)) == PROGRAMS


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(targets) > 4
    for target in targets:
        assert (ROOT / target).is_file(), target
    for picture in (ROOT / "info" / "pictures").iterdir():
        assert picture.stat().st_size < 150_000, picture


def test_what_architecture_and_conventions_name_exists() -> None:
    """Files and folders in the tree of rooms and in the text; each numbered convention once, in order."""
    text = (ROOT / "info" / "architecture.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:numerics|methods|records|cli)/\w+\.py)`", text):
        assert (ROOT / "libemc" / path).is_file(), path
    for path in re.findall(r"^  (\w+(?:\.py|/))", text, re.MULTILINE):
        assert (ROOT / "libemc" / path).exists(), path
    numbers = re.findall(r"^(\d+)\. ", (ROOT / "info" / "conventions.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [int(number) for number in numbers] == list(range(1, 18))


def test_no_text_sends_anyone_to_a_program_that_is_not_there() -> None:
    """In what the programs and the library say to users: every word that looks like a program is one."""
    for file in [*(ROOT / "programs").glob("*.py"), *(ROOT / "libemc").rglob("*.py")]:
        for name in re.findall(r"\bemc_[a-z]+\b", file.read_text(encoding="utf-8")):
            assert name in PROGRAMS or name == "emc_x", (file, name)
