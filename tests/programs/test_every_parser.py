"""The walk over every program: help, options, registration, tests of their own, size, and who imports whom.

An option means the same in every program that has it: two programs may share one only through `libemc.cli.options`,
where type and help are fixed and a program may set the default; everything else about it must be equal.
"""

from __future__ import annotations

import argparse
import ast
import configparser
import importlib
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from libemc.cli import Program, options

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "programs").glob("*.py"))
NAMES = [file.stem for file in FILES]
each_program = pytest.mark.parametrize("name", NAMES)

MOST_LINES_OF_A_PROGRAM = 170
MOST_LINES_OF_ITS_MAIN = 60
"""A program that grows beyond these has something in it that belongs into the library."""


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def program(name: str) -> Program:
    found = module(name).program
    assert isinstance(found, Program)
    return found


def actions(name: str) -> Iterator[argparse.Action]:
    """The arguments of a program's own and the standard ones."""
    yield from program(name).parser()._actions


def setup() -> configparser.ConfigParser:
    read = configparser.ConfigParser()
    read.read(ROOT / "setup.cfg", encoding="utf-8")
    return read


def test_there_are_programs_and_nothing_else() -> None:
    assert NAMES
    assert all(re.fullmatch(r"emc_[a-z]+", name) for name in NAMES)


def test_every_program_is_installed() -> None:
    modules = setup()["options"]["py_modules"].split()
    scripts = setup()["options.entry_points"]["console_scripts"].strip().splitlines()
    assert modules == NAMES
    assert [line.replace(" ", "") for line in scripts] == [f"{name}={name}:entry" for name in NAMES]


@each_program
def test_it_is_declared_under_its_own_name(name: str) -> None:
    assert program(name).name == name
    assert module(name).entry == program(name).entry
    assert program(name).doc == module(name).__doc__


@each_program
def test_its_help_has_an_example(name: str) -> None:
    doc = module(name).__doc__ or ""
    assert re.search(rf"^    (\S+=\S+ )?{name}\b", doc, re.MULTILINE), "an indented line that shows how it is used"
    assert len(doc.splitlines()[0]) > 20, "the first line says what it does"


@each_program
def test_the_options_in_its_examples_exist(name: str) -> None:
    known = {option for action in actions(name) for option in action.option_strings}
    for line in re.findall(rf"^    {name}\b.*", module(name).__doc__ or "", re.MULTILINE):
        used = set(re.findall(r"(?<=\s)--[a-z][a-z0-9-]*", line.partition(" #")[0].partition(" && ")[0]))
        assert used <= known


@each_program
def test_help_works_and_ends_with_0(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert program(name).main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert re.match(rf"usage: {name}\s", out) and err == ""
    assert "None" not in out and "==SUPPRESS==" not in out


@each_program
def test_a_misspelt_option_ends_with_2(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for word in ("--versoin", "--hel", "-z"):
        assert program(name).main([word]) == 2
        out, err = capsys.readouterr()
        assert out == "" and re.fullmatch(rf"{name}: error: there is no option {word}; .+\n", err)
    assert list(tmp_path.iterdir()) == []


@each_program
def test_its_options_are_spelt_and_explained(name: str) -> None:
    assert program(name).parser().allow_abbrev is False
    for action in actions(name):
        assert action.help and action.help is not argparse.SUPPRESS, action.dest
        assert not action.help.rstrip().endswith("."), f"{action.dest}: help is a phrase without a full stop"
        for option in action.option_strings:
            assert re.fullmatch(r"--[a-z][a-z0-9]*(-[a-z0-9]+)*", option) or option == "-h", option
        if isinstance(action.default, str) and action.type is not None:
            assert callable(action.type)
            action.type(action.default)


@each_program
def test_it_has_a_test_file_of_its_own_with_tests_in_it(name: str) -> None:
    file = ROOT / "tests" / "programs" / f"test_{name}.py"
    assert file.is_file()
    assert re.search(r"^\s*def test_", file.read_text(encoding="utf-8"), re.MULTILINE)


@each_program
def test_it_is_short_and_knows_no_other_program(name: str) -> None:
    text = (ROOT / "programs" / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES_OF_A_PROGRAM
    tree = ast.parse(text)
    (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert (main.end_lineno or 0) - main.lineno < MOST_LINES_OF_ITS_MAIN
    assert not imported(tree) & set(NAMES)


def imported(tree: ast.Module) -> set[str]:
    """The top-level names that a file imports."""
    nodes = list(ast.walk(tree))
    whole = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    parts = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in whole | parts}


def test_the_library_imports_no_program() -> None:
    for file in (ROOT / "libemc").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        assert not {name for name in imported(tree) if name.startswith("emc_")}, file


# ------------------------------------------------------------------------------------------------- between the programs


def meaning(action: argparse.Action) -> dict[str, object]:
    """What must be equal wherever an option of this name occurs."""
    kind = getattr(action.type, "__qualname__", action.type)
    return {
        "help": action.help,
        "type": kind,
        "metavar": action.metavar,
        "nargs": action.nargs,
        "choices": tuple(action.choices) if action.choices else None,
        "dest": action.dest,
        "action": type(action).__name__,
    }


def differences(found: dict[str, list[tuple[str, argparse.Action]]]) -> list[str]:
    """One line for each option that does not mean the same in all of its programs."""
    lines = []
    for option, uses in found.items():
        (first, model), *others = uses
        for name, action in others:
            differing = [key for key, value in meaning(action).items() if value != meaning(model)[key]]
            if differing:
                lines.append(f"{option}: {', '.join(differing)} in {first} and in {name}")
            if not all(getattr(each, "declared_once", False) for each in (model, action)):
                lines.append(f"{option}: declared by {first} and {name} themselves; move it to libemc.cli.options")
    return lines


TWO_MEANINGS = {"--refine"}
"""Fixed for two programs before they were there: emc_tomogram's says to improve an alignment, emc_tomocpr's what of a series."""


def test_an_option_means_the_same_everywhere() -> None:
    found: dict[str, list[tuple[str, argparse.Action]]] = defaultdict(list)
    for name in NAMES:
        for action in actions(name):
            for option in action.option_strings:
                found[option].append((name, action))
    assert not differences({option: uses for option, uses in found.items() if option not in TWO_MEANINGS})
    assert all(len(found[option]) == 2 for option in TWO_MEANINGS)


def test_the_walk_sees_what_it_should() -> None:
    """The comparison itself: a shared default may differ, anything else may not."""

    def action(add: object, **settings: object) -> argparse.Action:
        parser = options.Parser("emc_try", None)
        add(parser, **settings)  # type: ignore[operator]
        return parser._actions[-1]

    shared, other = action(options.lowpass), action(options.lowpass, default=40.0)
    assert differences({"--lowpass": [("emc_a", shared), ("emc_b", other)]}) == []
    own = action(lambda parser: parser.add_argument("--lowpass", type=float, metavar="A", help="resolution"))
    lines = differences({"--lowpass": [("emc_a", shared), ("emc_b", own)]})
    assert len(lines) == 2 and "help, type in emc_a and in emc_b" in lines[0] and "themselves" in lines[1]
