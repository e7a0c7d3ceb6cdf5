"""emc_info: what it prints of a record, and that the script of --replay makes the file again."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import mrcfile
import numpy as np
import pytest

import emc_info
from libemc import records
from libemc.cli import Program, Run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def examples(project: Path) -> Path:
    """A project with a record of each kind."""
    places = {"tiltseries": "info/TS_01_info.json", "set": "particles/ribo/particles.json"}
    places |= {"particles": "particles/ribo/TS_01.json", "run": "spt_00/run.json"}
    for kind, place in places.items():
        records.save_new(place, records.load(ROOT / "info" / f"example_{kind}.json"))
    Path("particles/ribo/TS_01.mrcs").touch()
    return project


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert emc_info.program.main(argv) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert emc_info.program.main(argv) == 2
    return capsys.readouterr().err


def test_a_record_by_its_name_or_file(examples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "TS_01")
    assert text == printed(capsys, "info/TS_01_info.json")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "shape 3; 1024; 960" in lines
    assert "use 2 of 3" in lines
    assert "defocus_u 31250.0; 31400.0; 31300.0" in lines
    assert "thickness 900.0" in lines and "landmarks -" in lines
    assert text.startswith("kind                     tiltseries\n") and text.endswith(" runs of programs\n")


def test_sets_and_runs(examples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "particles.json" not in printed(capsys, "ribo")
    assert printed(capsys, "ribo") == printed(capsys, "particles/ribo")
    assert "set " in printed(capsys, "ribo")
    assert printed(capsys, "spt_00") == printed(capsys, "spt_00/run.json")
    assert printed(capsys, "particles/ribo/TS_01.json").splitlines()[0].split() == ["kind", "particles"]


def test_the_header_of_an_image(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    array = np.zeros((4, 6, 8), np.float32)
    with mrcfile.new("map.mrc", array) as file:
        file.set_volume()
        file.voxel_size = 2.5
    assert printed(capsys, "map.mrc") == "map.mrc: volume 4 x 6 x 8 (z, y, x), float32, 2.5 Å/px\n"
    with mrcfile.new("images.st", array.astype(np.int16)) as file:
        file.set_image_stack()
    assert printed(capsys, "images.st") == "images.st: stack 4 x 6 x 8 (z, y, x), int16, without a pixel size\n"


def test_a_long_list_is_its_length_and_range() -> None:
    assert emc_info.brief([float(n) for n in range(-20, 21)]) == "41 entries, -20 to 20"
    assert emc_info.brief([True, False, True]) == "2 of 3"
    assert emc_info.brief({"a": None, "b": (1, 2)}) == "a -, b 1; 2"
    assert emc_info.brief([]) == emc_info.brief({}) == "none"


def test_tables_within_a_list_are_counted(examples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What an iteration says of each tilt series, and the sections that a record keeps of before, take no long lines."""
    iteration = {
        "band": 9.0,
        "trials": [0.5] * 30,
        "series": {"TS_01": {"before": [1.0] * 40}, "TS_02": {}},
        "more": {},
    }
    assert emc_info.brief([iteration, iteration]) == "; ".join(
        2 * ["band 9.0, trials 30 entries, 0.5 to 0.5, series 2 values, more none"]
    )
    assert emc_info.brief({"spt_00": {"reach": 9.0}}) == "spt_00 reach 9.0"
    path = Path("info/TS_01_info.json")
    record = records.load(path, records.TiltSeriesRecord)
    before = records.Replaced(program="emc_tomocpr", run="cpr_00", alignment=record.alignment)
    records.update(path, lambda old: old.model_copy(update={"replaced": (before,)}))
    (line,) = (line for line in printed(capsys, "TS_01").splitlines() if line.startswith("replaced "))
    count = len(before.model_dump()["alignment"])
    assert line.split(maxsplit=1)[1] == f"program emc_tomocpr, run cpr_00, alignment {count} values, ctf -"


def test_a_project_is_checked_record_by_record(examples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [line.split(":")[0] for line in printed(capsys).splitlines()] == [
        "info/TS_01_info.json", "particles/ribo/particles.json", "spt_00/run.json",
    ]  # fmt: skip
    path = Path("info/TS_01_info.json")
    path.write_text(path.read_text().replace('"voltage"', '"volts"'))
    assert "1 of 3 records can't be used" in refused(capsys)
    assert emc_info.program.main([]) == 2
    assert "info/TS_01_info.json: key source.voltage is missing" in capsys.readouterr().out
    Path("particles/ribo/TS_01.mrcs").unlink()
    assert "2 of 3 records can't be used" in refused(capsys)
    assert emc_info.program.main([]) == 2
    line = "particles/ribo/particles.json: its images particles/ribo/TS_01.mrcs are missing; extract them again"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["TS_1"], "TS_1: there is no such tilt series; did you mean TS_01?"),
        (["map.txt"], "map.txt: is neither a record nor an image; with --history or --replay: how it was made"),
        (["map.mrc", "--history"],
         "map.mrc: no program's history has it; name a record, or one of the project's outputs"),
        (["map.mrc", "--replay"],
         "map.mrc: no command in this project's histories wrote it; name one of the project's outputs"),
        (["TS_01", "--history", "--replay"],
         "argument --replay: not allowed with argument --history; see emc_info --help"),
    ],
)  # fmt: skip
def test_what_it_refuses(examples: Path, capsys: pytest.CaptureFixture[str], argv: list[str], line: str) -> None:
    Path("map.mrc").write_bytes(b"map")
    Path("map.txt").write_text("map")
    assert refused(capsys, *argv) == f"emc_info: error: {line}\n"


def test_an_empty_folder(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no such tilt series" in refused(capsys) or "there are no records" in refused(capsys)
    assert os.listdir() == []


# A chain of three small programs, run through the runner as the suite's own are, so that their histories are real ones.


def import_main(args: argparse.Namespace, run: Run) -> None:
    stack = run.input(args.stack)
    example = records.load(ROOT / "info" / "example_tiltseries.json", records.TiltSeriesRecord)
    source = example.source.model_copy(update={"stack": str(stack)})
    new = example.model_copy(update={"name": stack.stem, "source": source, "history": ()})
    records.save_new(records.tiltseries_path(stack.stem), new)


def sum_main(args: argparse.Namespace, run: Run) -> None:
    record = records.load(
        run.tiltseries(argparse.Namespace(names=[args.stack], all=False))[0], records.TiltSeriesRecord
    )
    total = sum(run.input(record.source.stack).read_bytes())
    run.output(f"tomograms/{args.stack}.txt").write_text(f"{total}\n")
    records.update(records.tiltseries_path(args.stack), lambda old: old)


def square_main(args: argparse.Namespace, run: Run) -> None:
    value = int(run.input(f"tomograms/{args.stack}.txt").read_text())
    run.output(f"tomograms/{args.stack}_squared.txt").write_text(f"{value**2}\n")
    records.update(records.tiltseries_path(args.stack), lambda old: old)


CHAIN = {"emc_first": import_main, "emc_second": sum_main, "emc_third": square_main}


def chained(name: str) -> Program:
    return Program(
        doc=None,
        name=name,
        main=CHAIN[name],
        standard=(),
        arguments=lambda parser: parser.add_argument("stack") and None,
    )


def test_the_script_makes_the_file_again(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, again, commands = (project / name for name in ("first", "again", "bin"))
    for folder in (first, again):
        (folder / "raw").mkdir(parents=True)
        (folder / "raw" / "TS 1.mrc").write_bytes(bytes(range(100)))
        (folder / "raw" / "TS_2.mrc").write_bytes(b"other")
    os.chdir(first)
    for name in CHAIN:
        for stack in ("TS 1", "TS_2"):
            assert chained(name).main([f"raw/{stack}.mrc" if name == "emc_first" else stack]) == 0
    capsys.readouterr()
    script = printed(capsys, "tomograms/TS 1_squared.txt", "--replay")
    run_lines = [line for line in script.splitlines() if line.startswith("emc_")]
    assert run_lines == ["emc_first 'raw/TS 1.mrc'", "emc_second 'TS 1'", "emc_third 'TS 1'"]
    history = printed(capsys, "tomograms/TS 1_squared.txt", "--history").splitlines()
    assert len(history) == 2 and "  done  wall " in history[0] and history[1] == "    $ emc_third 'TS 1'"
    assert len(printed(capsys, "TS 1", "--history").splitlines()) == 6
    os.chdir(project)
    assert printed(capsys, "first/tomograms/TS 1_squared.txt", "--replay") == script

    commands.mkdir()
    folders = [str(ROOT), str(ROOT / "programs"), str(Path(__file__).parent)]
    for name in CHAIN:
        lines = [f"#!{sys.executable}", "import sys", f"sys.path[:0] = {folders}"]
        lines += ["import test_emc_info", f"test_emc_info.chained({name!r}).entry()"]
        (commands / name).write_text("\n".join(lines))
        (commands / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["sh", "-c", script], cwd=again, env=environment, check=True)
    made = Path("tomograms/TS 1_squared.txt")
    assert (again / made).read_text() == (first / made).read_text() == f"{4950**2}\n"
    assert not (again / "info" / "TS_2_info.json").exists()
