"""The dataclasses, and the few rotations that conversions need, against the suite's own and scipy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from libemc.io import geometry
from libemc.numerics import rotations

EXACT = 1e-9  # degrees and matrix elements: rounding of float64 through arccosine-free formulae


def test_rotations_agree_with_numerics_and_scipy() -> None:
    angles = np.random.default_rng(1).uniform(-180, 180, (3, 50))
    ours = geometry.matrix_from_euler(*angles)
    np.testing.assert_allclose(ours, rotations.matrix_from_euler(*torch.tensor(angles)).numpy(), atol=EXACT)
    np.testing.assert_allclose(ours, Rotation.from_euler("ZYZ", angles.T, degrees=True).inv().as_matrix(), atol=EXACT)
    alignment = geometry.Alignment(tilt=angles[0] / 3, axis=angles[1], xtilt=angles[2] / 9, shift_x=0.0, shift_y=0.0)
    theirs = rotations.tilt_matrices(*(torch.tensor(a) for a in (alignment.axis, alignment.tilt, alignment.xtilt)))
    np.testing.assert_allclose(alignment.matrices(), theirs.numpy(), atol=EXACT)
    found = geometry.tilt_angles_from_matrix(alignment.matrices())
    np.testing.assert_allclose(found, [alignment.axis, alignment.tilt, alignment.xtilt], atol=1e-7)


@pytest.mark.parametrize("tilt", [0.0, 1e-7, 60.0, 180.0])
def test_euler_angles_come_back_as_the_same_rotation(tilt: float) -> None:
    matrix = geometry.matrix_from_euler(33.0, tilt, -71.0)
    angles = geometry.euler_from_matrix(matrix)
    assert 0 <= angles[1] <= 180
    np.testing.assert_allclose(geometry.matrix_from_euler(*angles), matrix, atol=EXACT)


def test_projection_by_hand() -> None:
    # a tilt of 90 degrees takes +z to +x, the axis of 90 degrees takes that to +y; then shift, then magnification
    alignment = geometry.Alignment(
        tilt=[0.0, 90.0], axis=[0.0, 90.0], shift_x=10.0, shift_y=0.0, magnification=[1.0, 2.0]
    )
    points = alignment.project([[1.0, 2.0, 3.0]])
    np.testing.assert_allclose(points[0], [[11.0, 2.0]], atol=EXACT)
    np.testing.assert_allclose(points[1], [[2 * (10 - 2), 2 * 3]], atol=EXACT)


def test_mirror_image_gives_the_same_images() -> None:
    random = np.random.default_rng(2)
    alignment = geometry.Alignment(tilt=[-40.0, 5.0, 50.0], axis=84.0, xtilt=3.0, shift_x=[1.0, 2, 3], shift_y=-4.0)
    points = random.normal(size=(9, 3))
    seen = alignment.mirrored().project(points * (1, 1, -1))
    np.testing.assert_allclose(seen, alignment.project(points), atol=EXACT)


def test_picks_of_a_turned_volume_are_where_its_record_says() -> None:
    angles, inside = (20.0, 50.0, -30.0), (70.0, 110.0, 5.0)
    turn = Rotation.from_euler("ZYZ", angles, degrees=True).inv()
    picks = geometry.Picks([[10.0, -20.0, 30.0]], [inside[0]], [inside[1]], [inside[2]], [0.5])
    moved = picks.out_of((1.0, 2.0, 3.0), angles)
    np.testing.assert_allclose(moved.xyz[0], turn.apply([10.0, -20.0, 30.0]) + np.array([1.0, 2.0, 3.0]), atol=1e-9)
    pose = turn * Rotation.from_euler("ZYZ", inside, degrees=True).inv()
    np.testing.assert_allclose(moved.matrices[0], pose.as_matrix(), atol=1e-9)
    assert moved.score[0] == 0.5
    upright = picks.out_of((1.0, 2.0, 3.0), (0.0, 0.0, 0.0))
    assert (upright.rot[0], upright.tilt[0], upright.psi[0]) == inside


def test_larger_defocus_comes_first() -> None:
    ctf = geometry.Ctf(defocus_u=[1e4, 3e4], defocus_v=[2e4, 1e4], angle=[10.0, 20.0])
    np.testing.assert_array_equal(ctf.defocus_u, [2e4, 3e4])
    np.testing.assert_array_equal(ctf.defocus_v, [1e4, 1e4])
    np.testing.assert_array_equal(ctf.angle, [100.0, 20.0])
    assert ctf.mirrored().handedness is None
