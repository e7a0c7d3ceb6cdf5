"""emc_demo: the quick chain reaches what its data allow, its commands are kept and parse, and what it refuses."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest

import emc_demo
from libemc import comparison, records
from libemc.cli import commands
from libemc.errors import CommandFailed, InputError
from libemc.methods.evaluate import alignment_error, slab_points
from libemc.methods.subtilts import TiltGeometry


def ran(*argv: str) -> int:
    return emc_demo.program.main(argv)


def in_process(command: str, folder: Path, threads: int) -> None:
    """What `execute` does, but for the start of a new interpreter each time, which takes longer than most of the work."""
    line, _, output = command.partition(" > ")
    name, *words = shlex.split(line)
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.chdir(folder)
        assert importlib.import_module(name).program.main(words) == 0, command
    if output:
        (folder / output).write_text(out.getvalue())


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a quick demo, and what it has printed."""
    folder, out = tmp_path_factory.mktemp("demo"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.chdir(folder)
        patch.setattr(emc_demo, "execute", in_process)
        assert ran("look", "--quick", "--threads", "1") == 0
    return folder / "look", out.getvalue()


def row(text: str, start: str) -> list[str]:
    """The cells after the first of a line of the table."""
    (line,) = (line for line in text.splitlines() if line.startswith(start))
    return re.split(r"\s{2,}", line.strip())[1:]


def first_number(cell: str) -> float:
    return float(cell.split()[0].rstrip("°,"))


def test_what_comes_out_is_near_the_truth(quick: tuple[Path, str]) -> None:
    """From 16 particles of 21 tilts at 6 Å and no truth at all: a model, and with it nearly all of the particles, the right way
    round. The alignment is that of the coarse stage alone."""
    _, text = quick
    assert row(text, "hand") == ["right", "right"]
    there, found = row(text, "particles found")
    assert there == "16" and first_number(found) >= 13 and found.endswith("and 0 wrong")
    assert first_number(row(text, "refined positions")[-1]) < 12.0
    assert first_number(row(text, "refined orientations")[-1]) < 4.0
    right, _, of_all = row(text, "orientations within")[-1].split()
    assert int(right) >= int(of_all) - 2
    assert 12 <= first_number(row(text, "resolution against the true map")[-1]) < 45
    assert first_number(row(text, "demo_01, alignment")[-1]) < 13.0


def test_every_program_takes_part_and_the_commands_are_kept(quick: tuple[Path, str]) -> None:
    folder, text = quick
    kept = [line for line in (folder / "commands.sh").read_text().splitlines() if line.startswith("emc_")]
    assert kept == re.findall(r"^\$ (emc_.*)$", text, re.MULTILINE)
    programs = {file.stem for file in Path(emc_demo.__file__).parent.glob("emc_*.py")}
    assert {line.split()[0] for line in kept} == programs - {"emc_demo"}
    again = (folder / "again.sh").read_text()
    assert "emc_refine good --reference sgd_00/class1.mrc" in again and "raw/demo_01.mrc" in again
    for picture in re.findall(r"^    (\S+\.png)$", text, re.MULTILINE):
        assert (folder.parent / picture).read_bytes().startswith(b"\x89PNG")
    assert {"average.png", "fsc.png", "demo_01_bin2.png"} <= {path.name for path in folder.rglob("*.png")}


def test_numbers_of_the_table_are_those_of_the_files(quick: tuple[Path, str]) -> None:
    """The library's comparison, called on the project as anyone may, and a rigid motion that does not count."""
    folder, text = quick
    truths = {"demo_01": folder / "raw/demo_01_truth.json"}
    claimed = json.loads((folder / "fsc/fsc.json").read_text())["resolution"]
    true_map = folder / "raw/demo_01_map_1.mrc"
    like = comparison.overlaid(folder / "final", true_map, folder / "mask.mrc", claimed)
    errors = comparison.pose_errors("sub_00", truths, 60.0, like, folder)
    assert f"{errors.distance.median():.1f} Å" == row(text, "refined positions")[-1]
    classes = comparison.class_agreement("pca_00", truths, 60.0, like, folder)
    assert f"{classes.right} of {classes.count}" == row(text, "particles in the class of most")[-1]
    page = (folder / "index.html").read_text()
    shown = re.findall(r'src="([^"]+)"', page)
    assert "mapback/demo_01.png" in shown and all((folder / picture).is_file() for picture in shown)
    assert all(cell in page for cell in row(text, "refined orientations"))
    record = records.load_tiltseries("demo_01", folder)
    found = TiltGeometry.of(records.need(record, "alignment"), record.tilts.use)
    known = json.loads(truths["demo_01"].read_text())
    points = slab_points(*known["field_A"], known["thick"])
    assert alignment_error(found, found, points).rms < 1e-6
    with pytest.raises(InputError, match="is of 3 tilts"):
        short = {k: v[:3] if isinstance(v, list) and len(v) == len(known["tilt"]) else v for k, v in known.items()}
        (folder / "short.json").write_text(json.dumps(short))
        comparison.alignment_error("demo_01", folder / "short.json", folder)


@pytest.mark.parametrize("size", [emc_demo.FULL, emc_demo.QUICK])
def test_every_command_parses(size: emc_demo.Size) -> None:
    for _, command in emc_demo.commands(size, 0):
        name, *words = shlex.split(command.partition(" > ")[0])
        importlib.import_module(name).program.parser().parse_all(words)


def test_dry_run_prints_the_commands(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran("--dry-run") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1:] == [command for _, command in emc_demo.commands(emc_demo.FULL, 0)]
    assert list(project.iterdir()) == []


def test_never_empties_a_folder_of_yours(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    for argv in (("mine",), ("mine", "--overwrite")):
        assert ran(*argv) == 2
        assert "is not a folder that emc_demo has made" in capsys.readouterr().err
    Path("mine/commands.sh").write_text("echo mine")
    assert ran("mine", "--overwrite") == 2
    Path("mine/commands.sh").write_text(emc_demo.FIRST_LINES + "\n")
    assert ran("mine") == 2
    assert "is not empty; give --overwrite" in capsys.readouterr().err
    assert Path("mine/thesis.txt").read_text() == "years of work"


def test_stops_at_a_failing_command_with_its_code(
    project: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = (("first", "emc_info {name} > out.txt"), ("never", "emc_info"))
    monkeypatch.setattr(emc_demo, "STEPS", steps)
    assert ran("here") == 2
    out, err = capfd.readouterr()
    assert out.splitlines()[-1] == "$ emc_info demo_01 > out.txt"
    lines = err.splitlines()
    assert lines[0].startswith("emc_info: error: demo_01: there is no such tilt series")
    assert lines[-1] == "emc_demo: error: ended with 2: (cd here && emc_info demo_01 > out.txt)"
    with pytest.raises(CommandFailed) as caught:
        commands.execute("emc_info --nothing", project, 1)
    assert caught.value.code == 2
