"""emc_tomogram: on a small series that is made here, and on the independent simulation."""

from __future__ import annotations

import json
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch

import emc_tomogram
from libemc import records
from libemc.io import mrc
from libemc.numerics.rotations import tilt_matrices
from libemc.records import Alignment, Ctf, Source, Tilts, TiltSeriesRecord

TILTS = np.linspace(-48, 48, 13)
PIXEL_SIZE = 10.0
SHAPE = (64, 72)
AXIS = 86.0


def run(*argv: str) -> int:
    return emc_tomogram.program.main([*argv, "--quiet"])


def section(shift: np.ndarray | None = None, **more: object) -> Alignment:
    count = len(TILTS)
    shift = np.zeros((count, 2)) if shift is None else shift
    return Alignment(
        axis=(AXIS,) * count,
        tilt=tuple(TILTS.tolist()),
        xtilt=(0.0,) * count,
        shift_x=tuple(shift[:, 0].tolist()),
        shift_y=tuple(shift[:, 1].tolist()),
        **more,
    )


def write(alignment: Alignment | None = None, ctf: Ctf | None = None, axis: float | None = AXIS) -> np.ndarray:
    """A project of one tilt series of Gaussian blobs; gives their positions, that of the darkest first."""
    rng = np.random.default_rng(0)
    points = np.concatenate([[[100.0, -80.0, 40.0]], (rng.random((80, 3)) - 0.5) * [1500, 1500, 150]])
    shift = (
        rng.normal(0, 15, (len(TILTS), 2)) if alignment is None else np.array([alignment.shift_x, alignment.shift_y]).T
    )
    q = np.einsum("tij,nj->tni", tilt_matrices(AXIS, torch.from_numpy(TILTS), 0.0).numpy()[:, :2], points)
    q = q + shift[:, None]
    y, x = [(np.arange(n) - n // 2) * PIXEL_SIZE for n in SHAPE]
    height = np.where(np.arange(len(points)) == 0, 4.0, 1.0)[:, None, None]  # the first stands out
    images = [
        -(
            height * np.exp(-((x - p[:, 0, None]) ** 2)[:, None] / 800 - ((y - p[:, 1, None]) ** 2)[:, :, None] / 800)
        ).sum(0)
        for p in q
    ]
    images = (np.array(images) * 500 + rng.normal(1000, 100, (len(TILTS), *SHAPE))).astype(np.float32)
    mrc.write_stack("ts.mrc", images, PIXEL_SIZE)
    record = TiltSeriesRecord(
        name="ts",
        source=Source(
            stack="ts.mrc",
            shape=images.shape,
            pixel_size=PIXEL_SIZE,
            voltage=300.0,
            cs=2.7,
            amplitude_contrast=0.07,
            tilt_axis=axis,
        ),
        tilts=Tilts(
            nominal=tuple(TILTS.tolist()),
            dose=(3.0,) * len(TILTS),
            dose_before=tuple(3.0 * i for i in range(len(TILTS))),
            use=(True,) * (len(TILTS) - 1) + (False,),
        ),
        alignment=alignment,
        ctf=ctf,
    )
    records.save_new(records.tiltseries_path("ts"), record)
    return points


def known() -> Alignment:
    return section(np.random.default_rng(1).normal(0, 15, (len(TILTS), 2)), thickness=150.0)


def test_align_and_reconstruct(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write()
    assert run("ts", "--bin", "2", "--thickness", "300") == 0
    line = capsys.readouterr().out
    assert line.startswith(
        "ts: 32 x 36 x 16 voxels of 20 Å from 12 tilts, axis 86.0°, median residual"
    )  # sides swapped
    record = records.load_tiltseries("ts")
    assert record.alignment is not None
    assert record.alignment.residual is not None
    assert record.alignment.residual[-1] is None  # not used
    (made,) = record.tomograms
    assert made.file == "tomograms/ts_bin2.mrc"
    assert (made.shape, made.pixel_size, made.corrections, made.half) == ((16, 36, 32), 20.0, ("dose",), None)
    with mrcfile.open(made.file) as volume:
        assert volume.data.shape == made.shape
        assert volume.data.dtype == np.float32
        assert float(volume.voxel_size.x) == pytest.approx(20.0)
        assert volume.data.std() > 0
    assert Path("tomograms/ts_bin2.png").read_bytes().startswith(b"\x89PNG")
    assert record.history[-1].program == "emc_tomogram"
    assert record.history[-1].state == "done"
    # an alignment is never replaced unless that's asked for
    assert run("ts", "--bin", "2") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(option in error for option in ("--load", "--refine", "--overwrite"))
    assert records.load_tiltseries("ts").alignment == record.alignment
    assert run("ts", "--bin", "2", "--refine") == 0
    refined = records.load_tiltseries("ts")
    assert refined.alignment != record.alignment
    assert len(refined.tomograms) == 1  # the same file
    assert run("ts", "--bin", "3", "--overwrite", "--axis", "85") == 0
    assert records.load_tiltseries("ts").alignment.axis[0] == 85.0
    assert [t.file for t in records.load_tiltseries("ts").tomograms] == [
        "tomograms/ts_bin2.mrc",
        "tomograms/ts_bin3.mrc",
    ]


def test_load_reconstructs_what_is_there(project: Path) -> None:
    point = write(known())[0]
    assert run("ts", "--bin", "1", "--load", "--no-dose", "--region", "50,150,-130,-30,-10,90") == 0
    record = records.load_tiltseries("ts")
    assert record.alignment == known()
    (made,) = record.tomograms
    assert made.corrections == ()
    assert made.centre == (100.0, -80.0, 40.0)
    volume, pixel_size = mrc.read_volume(made.file)
    z, y, x = np.unravel_index(volume.argmin(), volume.shape)  # the dark blob is at the region's middle
    found = (np.array([x, y, z]) - np.array(volume.shape[::-1]) // 2) * pixel_size + made.centre
    assert np.abs(found - point).max() <= pixel_size


def test_halves_and_corrections(project: Path) -> None:
    count = len(TILTS)
    ctf = Ctf(
        defocus_u=(20000.0,) * count, defocus_v=(20000.0,) * count, angle=(0.0,) * count, phase_shift=(0.0,) * count
    )
    write(known(), ctf)
    assert run("ts", "--load", "--bin", "2", "--ctf", "multiply", "--half", "--lowpass", "60", "--memory", "300M") == 0
    tomograms = {t.file: t for t in records.load_tiltseries("ts").tomograms}
    names = [f"tomograms/ts_bin2{suffix}.mrc" for suffix in ("", "_even", "_odd")]
    assert list(tomograms) == names
    assert [tomograms[name].half for name in names] == [None, 1, 2]
    assert tomograms[names[0]].corrections == ("dose", "lowpass 60", "ctf multiply")
    whole, even, odd = (mrc.read_volume(name)[0].ravel() for name in names)
    # the halves show the same specimen, each with noise of its own; together they are nearer to the whole
    assert 0.2 < np.corrcoef(even, odd)[0, 1] < 0.95
    assert np.corrcoef(even + odd, whole)[0, 1] > 0.9


def test_axis_is_estimated_with_a_warning(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(axis=None)
    assert run("ts", "--bin", "4") == 0
    assert "--axis" in capsys.readouterr().err
    found = records.load_tiltseries("ts").alignment.axis[0]
    assert abs((found - AXIS + 90) % 180 - 90) < 10.0  # of a field of 72 pixels with 13 tilts


def test_dry_run_does_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write()
    before = Path("info/ts_info.json").read_bytes()
    assert run("ts", "--dry-run") == 0
    assert "reconstruct 1 tomograms" in capsys.readouterr().out
    assert Path("info/ts_info.json").read_bytes() == before
    assert not Path("tomograms").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["ts", "--load"], "emc_tomogram"),  # is the program that makes an alignment
        (["ts", "--ctf", "wiener"], "emc_tomoctf"),
        (["ts", "--bin", "20"], "too small"),
        (["ts", "--load", "--refine"], "not allowed"),
        (["tz"], "ts"),
        (["ts", "--bin", "0"], "--bin"),
    ],
)
def test_bad_input_is_one_line(project: Path, capsys: pytest.CaptureFixture[str], argv: list[str], words: str) -> None:
    write()
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error
    assert not Path("tomograms/ts_bin4.mrc").exists()


def test_a_foreign_file_is_not_replaced(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(known())
    Path("tomograms").mkdir()
    Path("tomograms/ts_bin2.mrc").write_text("precious")
    assert run("ts", "--load", "--bin", "2") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert Path("tomograms/ts_bin2.mrc").read_text() == "precious"


def test_particles_are_where_the_truth_says(shared_data: Path, project: Path) -> None:
    """conf_01 with its true alignment: the mean density about the particles is darkest at their true centres."""
    truth = json.loads((shared_data / "sim" / "conf_01_truth.json").read_text())
    stack = shared_data / "sim" / "conf_01.mrc"
    count = len(truth["tilt"])
    shift = np.array(truth["shift_A"])
    record = TiltSeriesRecord(
        name="conf_01",
        source=Source(
            stack=str(stack),
            shape=mrc.open_stack(stack).shape,
            pixel_size=truth["apix"],
            voltage=300.0,
            cs=2.7,
            amplitude_contrast=0.07,
        ),
        tilts=Tilts(nominal=tuple(truth["nominal"]), use=(True,) * count),
        alignment=Alignment(
            axis=tuple(truth["axis"]),
            tilt=tuple(truth["tilt"]),
            xtilt=(0.0,) * count,
            shift_x=tuple(shift[:, 0]),
            shift_y=tuple(shift[:, 1]),
        ),
    )
    records.save_new(records.tiltseries_path("conf_01"), record)
    assert run("conf_01", "--bin", "4", "--load", "--thickness", "960") == 0
    volume, pixel_size = mrc.read_volume("tomograms/conf_01_bin4.mrc")
    reach = 12
    cuts = []
    for position in np.array(truth["pos_A"]):
        x, y, z = np.round(position / pixel_size).astype(int) + np.array(volume.shape[::-1]) // 2
        low = np.array([z, y, x]) - reach
        if (low >= 0).all() and (low + 2 * reach + 1 <= volume.shape).all():
            cuts.append(volume[tuple(slice(i, i + 2 * reach + 1) for i in low)])
    assert len(cuts) > 25
    mean = np.mean(cuts, axis=0)
    inner = mean - np.median(mean)
    # centre of what is darker than half of the darkest: particles in all orientations make a ball
    smooth = torch.nn.functional.avg_pool3d(torch.from_numpy(inner)[None, None], 5, 1, 2)[0, 0].numpy()
    weight = np.clip(0.5 * smooth.min() - smooth, 0, None)
    grid = np.stack(np.meshgrid(*[np.arange(-reach, reach + 1)] * 3, indexing="ij"))
    centre = (grid * weight).sum((1, 2, 3)) / weight.sum()
    assert smooth.min() < -4 * np.median(np.abs(smooth))
    assert np.abs(centre).max() < 1.0
