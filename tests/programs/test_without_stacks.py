"""Sets without a stack: every program gives the same, bit for bit, when the images are cut from the raw ones as it goes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import emc_average
import emc_export
import emc_extract
import emc_info
import emc_refine
import emc_select
from tests.by_hand import PIXEL, HandSeries, blobs_map, mrc_bytes

BOX = ("--label", "ribo", "--box", "16", "--bin", "2", "--quiet")


@pytest.fixture(scope="module")
def both_ways(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of a deformed, magnified series with an unused tilt and a particle at the edge: `cut` and `raw`."""
    folder = tmp_path_factory.mktemp("both")
    series = HandSeries(noise=0.3, particles=12, unused=(3,))
    series.positions[5] = (120.0, -110.0, 60.0)
    series.write(folder)
    path = folder / "info/TS_hand_info.json"
    record, rng = json.loads(path.read_text()), np.random.default_rng(2)
    field = {"rows": 2, "columns": 2, "field": [360.0, 340.0]}
    field |= {key: rng.normal(0, 1, (series.count, 4)).tolist() for key in ("dx", "dy")}
    record["alignment"]["deformation"] = field
    path.write_text(json.dumps(record))
    (folder / "ref.mrc").write_bytes(mrc_bytes(blobs_map(16, 2 * PIXEL), 2 * PIXEL, stack=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, more in (("cut", ()), ("raw", ("--no-stack",))):
            argv = ["TS_hand", "--set", name, *BOX, "--subtomograms", *more]
            assert emc_extract.program.main(argv) == 0
    return folder


@pytest.fixture
def here(both_ways: Path, project: Path) -> Path:
    shutil.copytree(both_ways, project, dirs_exist_ok=True)
    return project


def read(path: str) -> dict:
    return json.loads(Path(path).read_text())


def same(one: str, other: str, names: tuple[str, ...]) -> bool:
    """Whether files of two folders are the same bytes."""
    return all(Path(one, name).read_bytes() == Path(other, name).read_bytes() for name in names)


def test_particle_files(here: Path) -> None:
    """No stack, and all else as with one: the section that tells how to cut is there in both."""
    cut, raw = read("particles/cut/TS_hand.json"), read("particles/raw/TS_hand.json")
    assert cut["stack"] == "particles/cut/TS_hand.mrcs" and raw["stack"] is None
    assert not list(Path("particles/raw").glob("*.mrcs"))
    for key in set(cut) - {"stack", "set", "history"}:
        assert cut[key] == raw[key], key
    record, section = read("info/TS_hand_info.json"), raw["raw"]
    for key in ("axis", "tilt", "xtilt", "shift_x", "shift_y", "magnification", "deformation"):
        assert section[key] == record["alignment"][key]
    assert section["noise"][3] == 0 and all(n > 0 for j, n in enumerate(section["noise"]) if j != 3)
    volumes = tuple(f"subtomograms/TS_hand_{i:06d}.mrc" for i in range(12))
    assert same("particles/cut", "particles/raw", volumes)


def test_programs_give_the_same(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Maps, poses and exported images, with a stack, without, and with a stack that has been removed."""
    shutil.copytree("particles/cut", "particles/lost")
    for file in Path("particles/lost").glob("*.json"):
        file.write_text(file.read_text().replace("particles/cut/", "particles/lost/"))
    Path("particles/lost/TS_hand.mrcs").unlink()
    maps = ("half1.mrc", "half2.mrc", "average.mrc", "fsc.json")
    for name in ("cut", "raw", "lost"):
        assert emc_average.program.main([name, "--path", f"avg_{name}", "--quiet"]) == 0
        argv = [name, "--reference", "ref.mrc", "--startres", "14", "--local", "--iterations", "1", "--quiet"]
        assert emc_refine.program.main([*argv, "--path", f"spt_{name}"]) == 0
        assert emc_average.program.main([f"spt_{name}", "--path", f"again_{name}", "--quiet"]) == 0
        assert emc_export.program.main([name, "--format", "relion31", "--output", f"out/{name}", "--quiet"]) == 0
        assert emc_info.program.main([name]) == 0 and emc_info.program.main([f"particles/{name}/TS_hand.json"]) == 0
        if name != "cut":
            assert all(same(f"{kind}_cut", f"{kind}_{name}", maps) for kind in ("avg", "spt", "again"))
            assert same("out/cut", f"out/{name}", ("TS_hand.mrcs",))
            one, other = (read(f"spt_{n}/particles/TS_hand.json")["particles"] for n in ("cut", name))
            assert one == other
    assert one != read("particles/cut/TS_hand.json")["particles"]


def test_a_selection_reads_the_raw_images_too(here: Path) -> None:
    for name in ("cut", "raw"):
        argv = [name, "--set", f"part_{name}", "--region", "-100,5,-200,200,-200,200", "--quiet"]
        assert emc_select.program.main(argv) == 0
        assert emc_average.program.main([f"part_{name}", "--path", f"avg_{name}", "--quiet"]) == 0
    part = read("particles/part_raw/TS_hand.json")
    assert part["stack"] is None and 2 < len(part["particles"]) < 12
    assert same("avg_cut", "avg_raw", ("half1.mrc", "half2.mrc"))


def test_dry_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert emc_extract.program.main(["TS_hand", "--set", "new", *BOX, "--no-stack", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith(
        "find the places of 132 images of 16² from 1 tilt series (about 0 B of disk)"
    )
    assert not Path("particles/new").exists()
