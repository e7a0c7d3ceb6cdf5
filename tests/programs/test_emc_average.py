"""emc_average on a hand-drawn particle set with known poses: the map, its halves, its FSC, and what is written of them."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import mrcfile
import numpy as np
import pytest

import emc_average
import emc_fsc
from tests.by_hand import PIXEL, HandSeries, blobs_map, mrc_bytes, shell_correlation
from tests.programs.sets import extracted_by_hand

FILES = {"average.mrc", "half1.mrc", "half2.mrc", "mask.mrc", "fsc.json", "fsc.png", "average.png", "run.json"}


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with an extracted set of 16 particles in 11 tilts."""
    return extracted_by_hand(tmp_path_factory.mktemp("extracted"), HandSeries(noise=0.3, particles=16))


@pytest.fixture
def here(extracted: Path, project: Path) -> Path:
    shutil.copytree(extracted, project, dirs_exist_ok=True)
    return project


def ran(*argv: object) -> int:
    return emc_average.program.main([str(word) for word in argv])


def change_particles(change: object) -> None:
    path = Path("particles/ribo/TS_hand.json")
    content = json.loads(path.read_text())
    for i, particle in enumerate(content["particles"]):
        change(i, particle)  # type: ignore[operator]
    path.write_text(json.dumps(content))


def test_the_map(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both halves and the whole against the drawn particle; the whole is nearer to it; all files, all at 2 Å."""
    assert ran("ribo") == 0
    line = capsys.readouterr().out
    assert {p.name for p in Path("avg_00").iterdir() if not p.name.startswith(".")} == FILES
    true = blobs_map(32)
    curves = {n: shell_correlation(mrcfile.read(f"avg_00/{n}.mrc"), true) for n in ("half1", "half2", "average")}
    assert all(curve[1:5].min() > 0.95 for curve in curves.values())
    assert curves["average"][4:8].mean() > max(curves[n][4:8].mean() for n in ("half1", "half2"))
    for name in ("average", "half1", "half2", "mask"):
        with mrcfile.open(f"avg_00/{name}.mrc") as file:
            assert file.is_volume() and file.voxel_size.x == PIXEL and file.data.shape == (32, 32, 32)
    # the filtered map is on the scale of the signal: noise where nothing is stays small against the particle
    average = mrcfile.read("avg_00/average.mrc")
    assert average[16, 16, 16] > 5 * average[:4].std()
    content, run = (json.loads(Path(f"avg_00/{n}.json").read_text()) for n in ("fsc", "run"))
    half = shell_correlation(mrcfile.read("avg_00/half1.mrc"), mrcfile.read("avg_00/half2.mrc"))
    np.testing.assert_allclose(content["curves"]["unmasked"], half, atol=1e-4)
    mask = mrcfile.read("avg_00/mask.mrc").astype(float)
    masked = shell_correlation(mrcfile.read("avg_00/half1.mrc") * mask, mrcfile.read("avg_00/half2.mrc") * mask)
    np.testing.assert_allclose(content["curves"]["masked"], masked, atol=1e-4)
    assert content["frequency"][4] == pytest.approx(4 / (32 * PIXEL))
    assert run["state"] == {"particles": 16, "images": run["state"]["images"], "resolution": content["resolution"]}
    assert sum(run["state"]["images"]) == 16 * 11
    assert line == f"avg_00: 16 particles, 176 images, {content['resolution']:.2f} Å at FSC 0.143\n"


def test_record_of_the_run(here: Path) -> None:
    """run.json: options, inputs with size and digest, seed, complete; history with outputs that are all there."""
    assert ran("ribo", "--seed", 7, "--path", "mine") == 0
    run = json.loads(Path("mine/run.json").read_text())
    assert run["kind"] == "run" and run["program"] == "emc_average" and run["seed"] == 7 and run["stopped_at"] is None
    assert run["options"] == {
        "set_or_run": "ribo", "symmetry": "c1", "class": None, "weights": "run", "mask": None, "filter": None,
        "bfactor": None, "structure_factor": None,
    }  # fmt: skip
    (source,) = run["inputs"]
    assert source["path"] == "particles/ribo/particles.json" and source["size"] == Path(source["path"]).stat().st_size
    (entry,) = run["history"]
    assert entry["state"] == "done" and entry["seed"] == 7 and entry["argv"][0] == "emc_average"
    assert set(entry["outputs"]) == {f"mine/{name}" for name in FILES}
    assert "particles/ribo/particles.json" in entry["inputs"]


def test_same_seed_same_bytes(here: Path) -> None:
    """Numbered folders; everything but the history and the seed of the phases is the same in each."""
    for seed in (3, 3, 4):
        assert ran("ribo", "--seed", seed, "--quiet") == 0
    for name in FILES - {"run.json"}:
        assert Path(f"avg_00/{name}").read_bytes() == Path(f"avg_01/{name}").read_bytes(), name
    runs = [json.loads(Path(f"avg_0{i}/run.json").read_text()) for i in range(3)]
    assert {k: v for k, v in runs[0].items() if k != "history"} == {k: v for k, v in runs[1].items() if k != "history"}
    tables = [json.loads(Path(f"avg_0{i}/fsc.json").read_text())["curves"] for i in range(3)]
    assert tables[0]["masked"] == tables[2]["masked"] and tables[0]["randomised"] != tables[2]["randomised"]


def test_class_and_unused_particles(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Poses of all particles outside class 1 are wrong by 90°: only the class gives the map."""

    def change(i: int, particle: dict) -> None:
        particle["class"] = int(i < 10)
        if i >= 10:
            particle["rot"] += 90.0
        if i == 9:
            particle["use"], particle["tilt"] = False, particle["tilt"] + 120

    change_particles(change)
    assert ran("ribo", "--class", 1) == 0 and ran("ribo") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "9 particles" in lines[0] and "15 particles" in lines[1]
    assert ran("ribo", "--class", "0,1", "--path", "both", "--quiet") == 0
    assert Path("both/average.mrc").read_bytes() == Path("avg_01/average.mrc").read_bytes()
    one, mixed = (shell_correlation(mrcfile.read(f"avg_0{i}/average.mrc"), blobs_map(32))[2:5].mean() for i in (0, 1))
    assert one > 0.9 and one > mixed + 0.05


def test_weights_of_a_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Particles at wrong poses have no weight, or little: with the run's weights the map is good, without them it isn't.

    Of weight 0 they are left out, to the last bit as if they were not used.
    """

    def change(i: int, particle: dict) -> None:
        if i >= 10:
            particle["rot"] += 90.0
            particle["weight"] = 0.0

    change_particles(change)
    assert ran("ribo") == 0 and ran("ribo", "--weights", "none") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "10 particles" in lines[0] and "16 particles" in lines[1]
    good, mixed = (shell_correlation(mrcfile.read(f"avg_0{i}/average.mrc"), blobs_map(32))[2:5].mean() for i in (0, 1))
    assert good > 0.9 and good > mixed + 0.05
    change_particles(lambda i, particle: particle.update(use=i < 10, weight=None))
    assert ran("ribo", "--quiet") == 0
    assert Path("avg_00/average.mrc").read_bytes() == Path("avg_02/average.mrc").read_bytes()
    change_particles(lambda i, particle: particle.update(use=True, weight=0.1 if i >= 10 else 1.0))
    assert ran("ribo", "--quiet") == 0
    little = shell_correlation(mrcfile.read("avg_03/average.mrc"), blobs_map(32))[2:5].mean()
    assert mixed < little < good


def test_the_sharpened_average(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each shell of the average times exp(-B k²/4); the average itself is the same as without."""
    assert ran("ribo", "--quiet") == 0 and ran("ribo", "--bfactor", "-400") == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("; B factor -400 Å²")
    assert {p.name for p in Path("avg_01").iterdir() if not p.name.startswith(".")} == FILES | {"sharpened.mrc"}
    plain, sharp = mrcfile.read("avg_01/average.mrc"), mrcfile.read("avg_01/sharpened.mrc")
    assert (plain == mrcfile.read("avg_00/average.mrc")).all()
    spectra = [np.fft.rfftn(v.astype(float)) for v in (plain, sharp)]
    for shell in (3, 6, 9, 12):
        gain = math.exp(100 * (shell / (32 * PIXEL)) ** 2)
        assert spectra[1][0, 0, shell] == pytest.approx(gain * spectra[0][0, 0, shell], rel=1e-3)
    content = json.loads(Path("avg_01/fsc.json").read_text())
    assert content["b_factor"] == -400 and "b_factor" not in json.loads(Path("avg_00/fsc.json").read_text())
    options = json.loads(Path("avg_01/run.json").read_text())["options"]
    assert options["bfactor"] == [-400] and options["weights"] == "run"


def test_a_sharpened_map_for_each_b_factor(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Amplitudes of any two differ by exp(-(B1 - B2) k²/4), and each is the average of both halves times its gain."""
    assert ran("ribo", "--bfactor", "-100,-400,50.5") == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("; B factors -100, -400, 50 Å²")
    names = {"sharpened_b-100.mrc": -100, "sharpened_b-400.mrc": -400, "sharpened_b50.5.mrc": 50.5}
    assert {p.name for p in Path("avg_00").iterdir() if not p.name.startswith(".")} == FILES | set(names)
    content = json.loads(Path("avg_00/fsc.json").read_text())
    assert content["b_factors"] == names and "b_factor" not in content
    entry = json.loads(Path("avg_00/run.json").read_text())["history"][-1]
    assert set(entry["outputs"]) == {f"avg_00/{name}" for name in FILES | set(names)}
    files = {
        name: mrcfile.read(f"avg_00/{name}").astype(float) for name in (*names, "average.mrc", "half1.mrc", "half2.mrc")
    }
    axis = {name: np.fft.rfftn(volume)[0, 0] for name, volume in files.items()}
    shells = np.arange(2, 9)  # of 16; all of them carry signal
    assert min(content["curves"]["corrected"][2:9]) > 0.143
    k = shells / (32 * PIXEL)
    for first, b1 in names.items():
        gain = np.exp(-b1 * k**2 / 4)
        np.testing.assert_allclose(axis[first][shells], gain * axis["average.mrc"][shells], rtol=1e-3)  # float32
        for second, b2 in names.items():
            ratio = np.abs(axis[first] / axis[second])[shells]
            np.testing.assert_allclose(ratio, np.exp(-(b1 - b2) * k**2 / 4), rtol=1e-3)


def test_the_average_is_of_both_halves_weighted_by_their_fsc(here: Path) -> None:
    """Its spectrum is that of the halves' mean times C_ref² = 2 F/(1 + F), shell by shell, to the end of the signal.

    To 0.15: the filter knows how often each frequency was seen, and those of a shell were seen unequally often by 16
    particles. C_ref itself, or no filter, is farther off.
    """
    assert ran("ribo", "--quiet") == 0
    corrected = np.array(json.loads(Path("avg_00/fsc.json").read_text())["curves"]["corrected"][1:10])
    half1, half2, whole = (mrcfile.read(f"avg_00/{n}.mrc").astype(float) for n in ("half1", "half2", "average"))
    mean, filtered = np.fft.fftn(0.5 * (half1 + half2)), np.fft.fftn(whole)
    k = np.fft.fftfreq(32, 1 / 32)
    shell = np.rint(np.sqrt(k[:, None, None] ** 2 + k[:, None] ** 2 + k**2)).astype(int)
    part = [(mean[shell == s].conj() * filtered[shell == s]).real.sum() for s in range(1, 10)]
    found = np.array(part) / [(np.abs(mean[shell == s]) ** 2).sum() for s in range(1, 10)]
    wanted = 2 * corrected / (1 + corrected)
    assert abs(found - wanted).max() < 0.15 < abs(found - np.sqrt(wanted)).max()


@pytest.mark.parametrize("kind", ["spherical", "anisotropic", "local"])
def test_the_filtered_average_is_that_of_emc_fsc(here: Path, kind: str) -> None:
    """filtered.mrc and sharpened.mrc, as emc_fsc makes them of the half maps, the mask and the seed of the run."""
    Path("aim.mrc").write_bytes(mrc_bytes(blobs_map(32), PIXEL, stack=False))
    halves = ["avg/half1.mrc", "avg/half2.mrc", "--mask", "avg/mask.mrc", "--filter", kind, "--seed", "5", "--quiet"]
    for name, more in (("filtered", []), ("sharpened", ["--structure-factor", "aim.mrc"])):
        assert ran("ribo", "--filter", kind, *more, "--path", "avg", "--seed", 5, "--quiet") == 0
        assert emc_fsc.program.main([*halves, *more, "--output", name]) == 0
        found, other = mrcfile.read(f"avg/{name}.mrc"), mrcfile.read(f"{name}/filtered.mrc")
        np.testing.assert_allclose(found, other, atol=1e-4 * abs(other).max())  # halves went through float32
    assert not (mrcfile.read("avg/filtered.mrc") == mrcfile.read("avg/sharpened.mrc")).all()


def test_two_contrasts_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("aim.mrc").write_bytes(mrc_bytes(blobs_map(32), PIXEL, stack=False))
    assert ran("ribo", "--bfactor", "auto", "--structure-factor", "aim.mrc") == 2
    assert "--bfactor, --structure-factor: both give the map its contrast; give one of them" in capsys.readouterr().err
    assert not Path("avg_00").exists()


def test_symmetry(here: Path) -> None:
    """With c2 the map is invariant under x, y -> -x, -y (about n//2), and is the drawn one with its copy."""
    assert ran("ribo", "--symmetry", "c2", "--quiet") == 0
    found = mrcfile.read("avg_00/half1.mrc")[1:, 1:, 1:]  # the origin is the middle of these 31 voxels
    turned = found[:, ::-1, ::-1]
    assert np.linalg.norm(found - turned) < 0.02 * np.linalg.norm(found)  # interpolation of the insertion
    true = blobs_map(32)[1:, 1:, 1:]
    assert shell_correlation(found, true + true[:, ::-1, ::-1])[1:4].min() > 0.9
    assert json.loads(Path("avg_00/run.json").read_text())["options"]["symmetry"] == "c2"


def test_a_mask_of_ones_changes_nothing(here: Path) -> None:
    Path("ones.mrc").write_bytes(mrc_bytes(np.ones((32, 32, 32)), PIXEL, stack=False))
    assert ran("ribo", "--mask", "ones.mrc", "--quiet") == 0
    content = json.loads(Path("avg_00/fsc.json").read_text())["curves"]
    np.testing.assert_allclose(content["masked"], content["unmasked"], atol=1e-6)  # float32
    assert (mrcfile.read("avg_00/mask.mrc") == 1).all()
    assert [i["path"] for i in json.loads(Path("avg_00/run.json").read_text())["inputs"]][1:] == ["ones.mrc"]


def test_dry_run_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(here.rglob("*"))
    assert ran("ribo", "--dry-run") == 0
    assert capsys.readouterr().out.startswith("average 16 particles in a box of 32 (about ")
    assert sorted(here.rglob("*")) == before


def test_stopped_and_run_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after the first map: exit 130, the record says so, and the same command does all of it."""
    write = emc_average.project.mrc.write_volume

    def stops(path: Path, *rest: object) -> None:
        if Path(path).name == "half2.mrc":
            raise KeyboardInterrupt
        write(path, *rest)

    monkeypatch.setattr(emc_average.project.mrc, "write_volume", stops)
    assert ran("ribo", "--path", "avg", "--quiet") == 130
    run = json.loads(Path("avg/run.json").read_text())
    assert run["stopped_at"] == "average" and run["history"][-1]["state"] == "interrupted"
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert ran("ribo", "--path", "avg", "--quiet") == 0
    run = json.loads(Path("avg/run.json").read_text())
    assert run["stopped_at"] is None and [e["state"] for e in run["history"]] == ["interrupted", "done"]


def test_the_files_of_others_stay(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("avg").mkdir()
    Path("avg/half1.mrc").write_text("mine")
    assert ran("ribo", "--path", "avg") == 2
    assert "avg/half1.mrc: exists, and emc_average did not write it; give --overwrite" in capsys.readouterr().err
    assert [p.name for p in Path("avg").iterdir()] == ["half1.mrc"] and Path("avg/half1.mrc").read_text() == "mine"
