"""Tilt-series records by name and by path, and the line that says which program comes first."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from libemc.errors import InputError
from libemc.records import find_tiltseries, load_tiltseries, need, need_picks, tiltseries_path, update

INFO = Path(__file__).resolve().parents[2] / "info"


@pytest.fixture
def series(project: Path) -> Path:
    """A project with the example as its only tilt series."""
    path = tiltseries_path("TS_01")
    path.parent.mkdir()
    shutil.copy(INFO / "example_tiltseries.json", path)
    return path


def test_found_by_name_and_by_path(series: Path) -> None:
    assert series == Path("info/TS_01_info.json")
    assert load_tiltseries("TS_01") == load_tiltseries(series) == load_tiltseries("TS_01", project=Path.cwd())
    assert load_tiltseries("TS_01").alignment.axis == (85.1, 85.1, 85.1)  # type: ignore[union-attr]


def test_locks_and_other_files_are_not_tilt_series(series: Path) -> None:
    shutil.copy(series, "info/TS_00_info.json")
    update(series, lambda record: record)
    Path("info/.TS_09_info.json").write_text("")
    Path("info/notes.txt").write_text("")
    assert find_tiltseries() == [Path("info/TS_00_info.json"), series]
    assert find_tiltseries("nowhere") == []


def test_unknown_name_lists_the_known(series: Path) -> None:
    with pytest.raises(InputError, match=r"info/TS_1_info.json: no tilt series TS_1; there are TS_01"):
        load_tiltseries("TS_1")
    with pytest.raises(InputError, match="import it with emc_import"):
        load_tiltseries("TS_1", project="elsewhere")


def test_an_alignment_of_one_image_can_only_be_imported(series: Path) -> None:
    record = load_tiltseries("TS_01")
    one = record.model_copy(
        update={"source": record.source.model_copy(update={"shape": (1, 1024, 960)}), "alignment": None}
    )
    with pytest.raises(InputError, match=r"one image can't be aligned: .* emc_import --alignment FILE\.\.\. TS_01$"):
        need(one, "alignment")


@pytest.mark.parametrize(
    ("section", "remedy"),
    [
        ("alignment", "run emc_tomogram TS_01"),
        ("ctf", "run emc_tomoctf TS_01"),
        ("tomograms", "run emc_tomogram TS_01"),
        ("picks", "import some with emc_import --picks FILE --label L TS_01"),
    ],
)
def test_missing_section_says_how_it_is_made(series: Path, section: str, remedy: str) -> None:
    record = load_tiltseries("TS_01")
    assert need(record, section) == getattr(record, section)  # type: ignore[call-overload]
    undone = record.model_copy(update={section: () if section == "tomograms" else None})
    with pytest.raises(InputError, match=f"section {section} is not done yet; {remedy}$"):
        need(undone, section)  # type: ignore[call-overload]


def test_picks_by_label(series: Path) -> None:
    record = load_tiltseries("TS_01")
    assert need_picks(record, "ribo").source == "emc_tempmatch"
    with pytest.raises(InputError, match="no picks labelled 'virus'; there are ribo"):
        need_picks(record, "virus")
