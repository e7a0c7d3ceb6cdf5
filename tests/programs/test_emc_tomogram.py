"""emc_tomogram: on a small series that is made here, and on the independent simulation."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike
from scipy.spatial.transform import Rotation

import emc_tomogram
from libemc import alignments, records
from libemc.io import mrc
from libemc.numerics.rotations import tilt_matrices
from libemc.records import Alignment, Ctf, Landmarks, Source, Tilts, TiltSeriesRecord

TILTS = np.linspace(-48, 48, 13)
PIXEL_SIZE = 20.0
SHAPE = (64, 72)
AXIS = 86.0
BLANK = 4  # image that shows nothing, where that's asked for


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


def write(
    alignment: Alignment | None = None, ctf: Ctf | None = None, axis: float | None = AXIS, blank: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """A project of one tilt series of Gaussian blobs; gives their positions, that of the darkest first, and the shifts."""
    rng = np.random.default_rng(0)
    points = np.concatenate([[[200.0, -160.0, 80.0]], (rng.random((80, 3)) - 0.5) * [2400, 2400, 300]])
    shift = (
        rng.normal(0, 30, (len(TILTS), 2)) if alignment is None else np.array([alignment.shift_x, alignment.shift_y]).T
    )
    y, x = [(np.arange(n) - n // 2) * PIXEL_SIZE for n in SHAPE]
    height = np.where(np.arange(len(points)) == 0, 4.0, 1.0)[:, None, None]  # the first stands out
    images = [
        -(
            height * np.exp(-((x - p[:, 0, None]) ** 2)[:, None] / 3200 - ((y - p[:, 1, None]) ** 2)[:, :, None] / 3200)
        ).sum(0)
        for p in seen(AXIS, TILTS, shift, points)
    ]
    images = (np.array(images) * 500 + rng.normal(1000, 100, (len(TILTS), *SHAPE))).astype(np.float32)
    if blank:
        images[BLANK] = 7.0
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
    return points, shift


def seen(axis: ArrayLike, tilt: ArrayLike, shift: np.ndarray, points: np.ndarray, xtilt: ArrayLike = 0.0) -> np.ndarray:
    """Where the images show the points, (T, P, 2) Å."""
    angles = [
        torch.as_tensor(np.broadcast_to(np.asarray(a, float), np.shape(tilt)).copy()) for a in (axis, tilt, xtilt)
    ]
    return np.einsum("tij,nj->tni", tilt_matrices(*angles).numpy()[:, :2], points) + shift[:, None]


def wrong(found: Alignment, points: np.ndarray, shift: np.ndarray, use: np.ndarray) -> float:
    """Å rms between where the specimen is seen and where an alignment shows it, in the best linear frame."""
    targets = seen(AXIS, TILTS, shift, points)[use]
    rows = tilt_matrices(*(torch.tensor(a)[use] for a in (found.axis, found.tilt, found.xtilt))).numpy()[:, :2]
    mag = np.array(found.magnification or (1.0,) * len(TILTS))[use]
    moves = (np.array([found.shift_x, found.shift_y]).T)[use]
    design = (mag[:, None, None] * rows).reshape(-1, 3)
    left = (targets - (mag[:, None] * moves)[:, None]).transpose(0, 2, 1).reshape(-1, len(points))
    residual = left - design @ np.linalg.lstsq(design, left, rcond=None)[0]
    return float(np.sqrt((residual**2).mean() * 2))


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, np.ndarray, str]:
    """A project that is aligned and no more, its points and shifts, and what the program said."""
    folder, out = tmp_path_factory.mktemp("aligned"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        patch.chdir(folder)
        points, shift = write(blank=True)
        assert run("ts", "--align-only", "--threads", "1") == 0
    return folder, points, shift, out.getvalue()


@pytest.fixture
def aligned(once: tuple[Path, np.ndarray, np.ndarray, str], project: Path) -> Path:
    """A copy of it, and the working directory of the test."""
    shutil.copytree(once[0], project, dirs_exist_ok=True)
    return project


def known(**more: object) -> Alignment:
    return section(np.random.default_rng(1).normal(0, 30, (len(TILTS), 2)), thickness=300.0, **more)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures, which take as long as the alignment."""
    monkeypatch.setattr(alignments, "_draw", lambda *_: None)


def test_align_only(once: tuple[Path, np.ndarray, np.ndarray, str], aligned: Path) -> None:
    """The geometry is right to half a pixel, the image without contrast is out, pictures are there, and no tomogram."""
    _, points, shift, out = once
    assert "ts: 11 of 13 tilts, axis " in out and "features, error" in out
    record = records.load_tiltseries("ts")
    found, use = record.alignment, np.array(record.tilts.use)
    assert found is not None and not found.hand_open and found.landmarks is not None
    assert np.flatnonzero(~use).tolist() == [BLANK, len(TILTS) - 1]
    assert record.tilts.reason is not None
    assert record.tilts.reason[BLANK].startswith("alignment: ") and record.tilts.reason[-1] is None
    assert "image 5" in out  # the blank one, counted from 1
    assert set(found.landmarks.kind) == {"feature"} and len(found.landmarks.xyz) >= 8
    assert found.error is not None and all(e < PIXEL_SIZE for e, used in zip(found.error, use, strict=True) if used)
    assert wrong(found, points, shift, use) < 0.5 * PIXEL_SIZE < 30  # and shifts of 30 Å are taken off
    pictures = {file.name for file in Path("tomograms/ts_alignment").iterdir()}
    assert pictures == {"alignment.png", "residuals.png", "landmark.png", "tilts.png"}
    assert record.tomograms == () and not list(Path("tomograms").glob("*.mrc"))
    assert record.history[-1].program == "emc_tomogram"
    assert record.history[-1].state == "done"


def test_an_alignment_is_not_replaced_by_itself(aligned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("info/ts_info.json").read_bytes()
    assert run("ts", "--bin", "2") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(option in error for option in ("--load", "--refine", "--overwrite"))
    for other in ("--load", "--refine"):
        assert run("ts", other, "--axis", "86") == 2
        assert "--axis" in capsys.readouterr().err
    assert Path("info/ts_info.json").read_bytes() == before


def test_load_then_refine(
    once: tuple[Path, np.ndarray, np.ndarray, str], aligned: Path, undrawn: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("ts", "--load", "--bin", "2", "--thickness", "600") == 0
    line = capsys.readouterr().out
    assert line.startswith("ts: 32 x 36 x 16 voxels of 40 Å from 11 tilts, 11 of 13 tilts, axis")  # sides swapped
    first = records.load_tiltseries("ts")
    (made,) = first.tomograms
    assert made.file == "tomograms/ts_bin2.mrc"
    assert (made.shape, made.pixel_size, made.corrections, made.half) == ((16, 36, 32), 40.0, ("dose",), None)
    with mrcfile.open(made.file) as volume:
        assert volume.data.shape == made.shape
        assert volume.data.dtype == np.float32
        assert float(volume.voxel_size.x) == pytest.approx(40.0)
        assert volume.data.std() > 0
    assert Path("tomograms/ts_bin2.png").read_bytes().startswith(b"\x89PNG")
    # a poor alignment is improved, and the tomogram of the same name is made again
    poor = np.random.default_rng(3).normal(0, 12, len(TILTS))
    spoilt = first.alignment.model_copy(update={"shift_x": tuple(np.add(first.alignment.shift_x, poor).tolist())})
    path = records.tiltseries_path("ts")
    records.update(path, lambda old: old.model_copy(update={"alignment": spoilt}), TiltSeriesRecord)
    _, points, shift, _ = once
    assert run("ts", "--bin", "2", "--refine", "--threads", "1") == 0
    refined = records.load_tiltseries("ts")
    use = np.array(refined.tilts.use)
    errors = [wrong(a, points, shift, use) for a in (spoilt, refined.alignment)]
    assert errors[1] < 0.7 * errors[0] and errors[1] < 0.5 * PIXEL_SIZE
    assert len(refined.tomograms) == 1


def test_overwrite_begins_anew_with_all_that_an_alignment_left_out(aligned: Path, undrawn: None) -> None:
    """An image that an earlier alignment left out is tried again; one that somebody excluded stays out."""
    path = records.tiltseries_path("ts")
    use = tuple(j not in (0, 3, BLANK, len(TILTS) - 1) for j in range(len(TILTS)))
    reason = tuple({0: "ice", 3: "alignment: it fell", BLANK: "blank"}.get(j) for j in range(len(TILTS)))

    def excluded(old: TiltSeriesRecord) -> TiltSeriesRecord:
        return old.model_copy(update={"tilts": old.tilts.model_copy(update={"use": use, "reason": reason})})

    records.update(path, excluded, TiltSeriesRecord)
    assert run("ts", "--align-only", "--overwrite", "--axis", "85", "--threads", "1") == 0
    record = records.load_tiltseries("ts")
    assert np.flatnonzero(~np.array(record.tilts.use)).tolist() == [0, BLANK, len(TILTS) - 1]
    assert record.tilts.reason is not None
    assert record.tilts.reason[0] == "ice" and record.tilts.reason[3] is None


def test_load_reconstructs_what_is_there(project: Path) -> None:
    point = write(known())[0][0]
    assert run("ts", "--bin", "1", "--load", "--no-dose", "--region", "100,300,-260,-60,-20,180") == 0
    record = records.load_tiltseries("ts")
    assert record.alignment == known()
    (made,) = record.tomograms
    assert made.file == "tomograms/ts_bin1_region.mrc"  # never the name of the whole
    assert made.corrections == ()
    assert made.centre == (200.0, -160.0, 80.0)
    volume, pixel_size = mrc.read_volume(made.file)
    z, y, x = np.unravel_index(volume.argmin(), volume.shape)  # the dark blob is at the region's middle
    found = (np.array([x, y, z]) - np.array(volume.shape[::-1]) // 2) * pixel_size + made.centre
    assert np.abs(found - point).max() <= pixel_size
    assert run("ts", "--bin", "1", "--load", "--region", "100,300,-260,-60,-20,180", "--tag", "blob", "--half") == 0
    names = [f"tomograms/ts_bin1_{word}.mrc" for word in ("region", "blob", "blob_even", "blob_odd")]
    assert [made.file for made in records.load_tiltseries("ts").tomograms] == names
    assert all(Path(name).is_file() and Path(name).with_suffix(".png").is_file() for name in names)


def test_a_turned_region_stands_as_its_angles_say(project: Path) -> None:
    point = write(known())[0][0]
    region, turn = "100,420,-260,-60,-20,180", "90,90,0"  # the volume's x, y and z are the specimen's -y, z and -x
    assert run("ts", "--bin", "1", "--load", "--no-dose", "--region", region, "--turn", turn) == 0
    (made,) = records.load_tiltseries("ts").tomograms
    assert made.file == "tomograms/ts_bin1_region.mrc" and made.angles == (90.0, 90.0, 0.0)
    volume, pixel_size = mrc.read_volume(made.file)
    assert volume.shape[::-1] == (16, 10, 10) and made.centre == (260.0, -160.0, 80.0)
    z, y, x = np.unravel_index(volume.argmin(), volume.shape)
    v = (np.array([x, y, z]) - np.array(volume.shape[::-1]) // 2) * pixel_size
    turned = Rotation.from_euler("ZYZ", made.angles, degrees=True).inv().as_matrix()
    assert np.abs(turned @ v + made.centre - point).max() <= pixel_size
    assert np.abs(v - (0, 0, 60)).max() <= pixel_size
    assert run("ts", "--bin", "2", "--load", "--no-dose", "--turn", "0,0,45") == 0  # never the name of the upright one
    assert records.load_tiltseries("ts").tomograms[-1].file == "tomograms/ts_bin2_turned.mrc"


def optics() -> Ctf:
    count = len(TILTS)
    return Ctf(
        defocus_u=(20000.0,) * count, defocus_v=(20000.0,) * count, angle=(0.0,) * count, phase_shift=(0.0,) * count
    )


def test_halves_and_corrections(project: Path) -> None:
    write(known(), optics())
    assert run("ts", "--load", "--bin", "2", "--ctf", "multiply", "--half", "--lowpass", "120", "--memory", "300M") == 0
    tomograms = {t.file: t for t in records.load_tiltseries("ts").tomograms}
    names = [f"tomograms/ts_bin2{suffix}.mrc" for suffix in ("", "_even", "_odd")]
    assert list(tomograms) == names
    assert [tomograms[name].half for name in names] == [None, 1, 2]
    assert tomograms[names[0]].corrections == ("dose", "lowpass 120", "ctf multiply")
    whole, even, odd = (mrc.read_volume(name)[0].ravel() for name in names)
    # the halves show the same specimen, each with noise of its own; together they are nearer to the whole
    assert 0.2 < np.corrcoef(even, odd)[0, 1] < 0.95
    assert np.corrcoef(even + odd, whole)[0, 1] > 0.9


def test_deconvolution(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says what it did, its strength and its falloff change the tomogram, and it needs the CTF, and no other correction."""
    write(known(), optics())
    made = []
    for tag, more in (("a", ()), ("b", ("0.2",)), ("c", ("0.2", "--snr-falloff", "2"))):
        assert run("ts", "--load", "--bin", "2", "--tag", tag, "--deconvolve", *more) == 0
        entry = records.load_tiltseries("ts").tomograms[-1]
        assert entry.file == f"tomograms/ts_bin2_{tag}.mrc"
        assert any("deconv" in word for word in entry.corrections)
        made.append(mrc.read_volume(entry.file)[0].ravel())
    assert all(np.isfinite(volume).all() and volume.std() > 0 for volume in made)
    assert max(np.corrcoef(made)[np.triu_indices(3, 1)]) < 0.9999
    capsys.readouterr()
    assert run("ts", "--load", "--bin", "2", "--deconvolve", "--ctf", "wiener") == 2
    assert "not allowed" in capsys.readouterr().err


def test_beads_are_erased(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The dark blob, a bead among the landmarks, is gone; without one among them there is a warning."""
    bead = Landmarks(xyz=((200.0, -160.0, 80.0),), kind=("bead",), diameter=(120.0,), residual=(1.0,))
    write(known(landmarks=bead))
    region = ("--region", "100,300,-260,-60,-20,180")
    assert run("ts", "--load", "--bin", "1", *region, "--tag", "with") == 0
    assert run("ts", "--load", "--bin", "1", *region, "--tag", "without", "--erase-beads") == 0
    assert "no beads" not in capsys.readouterr().err
    entries = records.load_tiltseries("ts").tomograms
    assert entries[1].corrections[0] == "beads erased" and "beads erased" not in entries[0].corrections
    middle = [volume[tuple(n // 2 for n in volume.shape)] for volume in (mrc.read_volume(e.file)[0] for e in entries)]
    assert middle[0] < 0 and abs(middle[1]) < 0.3 * abs(middle[0])
    plain = known()
    path = records.tiltseries_path("ts")
    records.update(path, lambda old: old.model_copy(update={"alignment": plain}), TiltSeriesRecord)
    assert run("ts", "--load", "--bin", "2", "--erase-beads") == 0
    assert "no beads among its landmarks" in capsys.readouterr().err


def test_axis_is_estimated_with_a_warning(project: Path, undrawn: None, capsys: pytest.CaptureFixture[str]) -> None:
    write(axis=None)
    assert run("ts", "--align-only", "--threads", "1") == 0
    assert "--axis" in capsys.readouterr().err
    found = records.load_tiltseries("ts").alignment
    assert found.hand_open
    assert abs((found.axis[0] - AXIS + 90) % 180 - 90) < 10.0  # of a field of 72 pixels with 13 tilts


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
        (["ts", "--ctf", "wiener"], "run emc_tomoctf"),
        (["ts", "--bin", "20"], "too small"),
        (["ts", "--load", "--refine"], "not allowed"),
        (["ts", "--load", "--align-only"], "not allowed"),
        (["ts", "--load", "--local-motion"], "--local-motion has no meaning"),
        (["ts", "--refine"], "alignment"),
        (["ts", "--deconvolve"], "run emc_tomoctf"),
        (["ts", "--tag", "a/b"], "--tag"),
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
