"""The other hand: the same images, positions and defocus; and the mirror image wherever something is made from them."""

from __future__ import annotations

import json
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch

import emc_average
import emc_extract
from libemc.methods import extract, reconstruct
from libemc.methods.mirror import mirrored, summary
from libemc.methods.reconstruct import CtfCorrection, Grid
from libemc.methods.subtilts import TiltGeometry
from libemc.numerics.rotations import matrix_from_euler
from libemc.numerics.slices import project as projections
from libemc.records import Alignment, Deformation, Landmarks, TiltSeriesRecord, Tomogram
from tests import by_hand
from tests.by_hand import HandSeries, blobs_map

INVERSION = -np.eye(3)


def a_record(series: HandSeries, **source) -> TiltSeriesRecord:
    """All that a record can hold that has to do with space: landmarks, local motion, oriented picks, a tomogram."""
    content = series.record()
    content["source"] |= source
    record = TiltSeriesRecord.model_validate_json(json.dumps(content))
    rng = np.random.default_rng(7)
    dx, dy = (tuple(map(tuple, rng.normal(0, 5, (series.count, 6)).tolist())) for _ in range(2))
    points = tuple(map(tuple, rng.uniform(-150, 150, (5, 3)).tolist()))
    kinds, unknown = ("bead",) * 5, (None,) * 5
    more = {
        "landmarks": Landmarks(xyz=points, kind=kinds, diameter=unknown, residual=unknown),
        "deformation": Deformation(rows=2, columns=3, field=(400.0, 300.0), dx=dx, dy=dy),
        "hand_open": True,
    }
    tomograms = (Tomogram(file="tomograms/TS_hand_bin4.mrc", pixel_size=8.0, shape=(20, 40, 40)),)
    assert record.alignment is not None
    return record.model_copy(update={"alignment": record.alignment.model_copy(update=more), "tomograms": tomograms})


def geometry_of(record: TiltSeriesRecord) -> TiltGeometry:
    assert record.alignment is not None
    return TiltGeometry.of(record.alignment, record.tilts.use)


def test_every_image_stays() -> None:
    """Landmarks and picks are seen where they were, at opposite heights, and with the defocus that they had."""
    before = a_record(HandSeries())
    after = mirrored(before)
    for old, new in (
        (before.alignment.landmarks.xyz, after.alignment.landmarks.xyz),
        (before.picks["ribo"].xyz, after.picks["ribo"].xyz),
    ):
        assert np.abs(old).max() > 50 and np.array_equal(np.negative(old), new)
        positions, heights = geometry_of(before).project(torch.tensor(old))
        again, opposite = geometry_of(after).project(torch.tensor(new))
        # float64 at some hundred Å; the angles in degrees are a few hundred, the deformation's splines the least exact
        np.testing.assert_allclose(again.numpy(), positions.numpy(), rtol=0, atol=1e-9)
        np.testing.assert_allclose(opposite.numpy(), -heights.numpy(), rtol=0, atol=1e-9)
        assert heights.abs().max() > 50
        cuts = [
            extract.locate(points, geometry_of(r), r.ctf, (170, 181), 2.0, 32)
            for points, r in ((old, before), (new, after))
        ]
        np.testing.assert_allclose(cuts[1].defocus.numpy(), cuts[0].defocus.numpy(), rtol=0, atol=1e-8)
    assert after.ctf.defocus_handedness == -before.ctf.defocus_handedness
    assert after.alignment.hand_open and after.tomograms == () and len(before.tomograms) == 1


def test_poses_are_those_of_the_inverted_reference() -> None:
    """The projections of the blobs and of the inverted blobs in the same pose; those of the blobs as they were differ."""
    before = a_record(HandSeries())
    after = mirrored(before)
    picks = after.picks["ribo"]
    assert (picks.rot, picks.tilt, picks.psi) == tuple(getattr(before.picks["ribo"], a) for a in ("rot", "tilt", "psi"))
    turn = matrix_from_euler(picks.rot[0], picks.tilt[0], picks.psi[0])
    plain, inverted = (torch.from_numpy(blobs_map(33, rotation=r)) for r in (np.eye(3), INVERSION))
    images = projections(plain, geometry_of(before).matrices @ turn)
    same = projections(inverted, geometry_of(after).matrices @ turn)
    other = projections(plain, geometry_of(after).matrices @ turn)
    assert (same - images).abs().max() < 1e-4 * images.max()  # float32 transforms
    assert (other - images).abs().max() > 0.1 * images.max()


def test_the_average_is_inverted(project: Path) -> None:
    """Images drawn by hand, cut and averaged as they are and with the other hand: the map, and its inverse."""
    series = HandSeries(noise=0.2, particles=9)
    series.write(project)
    info = project / "info/TS_hand_info.json"
    before = TiltSeriesRecord.model_validate_json(info.read_text())
    blobs, inverse = blobs_map(32), blobs_map(32, rotation=INVERSION)
    for record, want, wrong in ((before, blobs, inverse), (mirrored(before), inverse, blobs)):
        info.write_text(record.model_dump_json(by_alias=True))
        for program, words in (
            (emc_extract, ["TS_hand", "--label", "ribo", "--set", "ribo", "--box", "32"]),
            (emc_average, ["ribo", "--path", "avg"]),
        ):
            assert program.program.main([*words, "--quiet", "--overwrite"]) == 0
        found = mrcfile.read("avg/average.mrc")
        assert by_hand.shell_correlation(found, want)[1:5].min() > 0.9
        assert by_hand.shell_correlation(found, wrong)[2:8].mean() < 0.5


def test_the_tomogram_is_inverted() -> None:
    """Corrected for a CTF that changes steeply with height, voxel by voxel; with only the handedness changed it's another.

    The grid has odd sides, of one tile, so that its points go onto each other.
    """
    before = a_record(HandSeries(defocus=20000.0, astigmatism=0.0))
    images = np.random.default_rng(3).standard_normal((before.source.shape[0], 170, 181)).astype(np.float32)
    other = mirrored(before)
    volumes = []
    for record, side in ((before, 1), (other, -1), (before.model_copy(update={"ctf": other.ctf}), 1)):
        grid = Grid((17, 33, 31), 2.0, (side * 6.0, side * -10.0, side * 300.0))
        slabs = reconstruct.reconstruct(images, geometry_of(record), grid, CtfCorrection.of(record, "multiply"))
        volumes.append(np.concatenate([slab for _, slab in slabs], axis=1))
    spread = volumes[0].std()
    assert np.abs(volumes[1][::-1, ::-1, ::-1] - volumes[0]).max() < 1e-3 * spread
    assert np.abs(volumes[2] - volumes[0]).max() > 0.3 * spread


@pytest.mark.parametrize(
    ("nominal", "aligned", "want_nominal", "want_aligned"),
    [
        (85.0, 85.3, -95.0, -94.7),
        (-95.0, -94.7, 85.0, 85.3),
        (0.0, 0.5, -180.0, -179.5),
        (0.0, -0.5, 180.0, 179.5),
        (-95.0, 85.3, -95.0, -94.7),  # aligned with an --axis that was the other way round
        (None, 85.3, -94.7, -94.7),
        (85.0, None, -95.0, None),
        (None, None, None, None),
    ],
)
def test_the_axis_and_the_nominal_one_agree(nominal, aligned, want_nominal, want_aligned) -> None:
    """A new alignment, which begins at the nominal axis, has the hand of the record."""
    record = a_record(HandSeries(), tilt_axis=nominal)
    axis = None if aligned is None else tuple(aligned + d for d in np.linspace(-2, 2, 11).tolist())
    alignment = None if axis is None else record.alignment.model_copy(update={"axis": axis})
    after = mirrored(record.model_copy(update={"alignment": alignment}))
    assert after.source.tilt_axis == (None if want_nominal is None else pytest.approx(want_nominal, abs=1e-9))
    if axis is None:
        assert after.alignment is None
    else:
        np.testing.assert_allclose(after.alignment.axis, want_aligned + np.linspace(-2, 2, 11), rtol=0, atol=1e-9)


def test_twice_is_not_at_all() -> None:
    before = a_record(HandSeries()).model_copy(update={"tomograms": ()})
    twice = mirrored(mirrored(before))
    np.testing.assert_allclose(twice.alignment.axis, before.alignment.axis, rtol=0, atol=1e-9)
    same = {"alignment": twice.alignment.model_copy(update={"axis": before.alignment.axis})}
    assert twice.model_copy(update=same) == before


def test_what_is_not_there_stays_away() -> None:
    record = a_record(HandSeries()).model_copy(update={"ctf": None, "picks": {}, "tomograms": ()})
    plain = Alignment(**{k: getattr(record.alignment, k) for k in ("axis", "tilt", "xtilt", "shift_x", "shift_y")})
    after = mirrored(record.model_copy(update={"alignment": plain}))
    assert after.ctf is None and after.picks == {} and after.alignment.landmarks is None
    assert TiltSeriesRecord.model_validate(after.model_dump()) == after


def test_one_line_says_what_is_to_be_made_again() -> None:
    before = a_record(HandSeries())
    line = summary(before, mirrored(before))
    assert "\n" not in line
    for words in (
        "TS_hand: tilt axis -62.0° now 118.0°", "handedness now +1", "5 landmarks, 9 picks ribo inverted",
        "inverted reference", "emc_tomogram TS_hand --load --overwrite", "extract its particles again",
    ):  # fmt: skip
        assert words in line
    bare = before.model_copy(update={"alignment": None, "ctf": None, "picks": {}, "tomograms": ()})
    line = summary(bare, mirrored(bare))
    assert line == "TS_hand: nominal tilt axis now 117.0°; extract its particles again"
