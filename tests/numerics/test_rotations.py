"""rotations: against scipy's Rotation, closed forms and finite differences. Tolerances are rounding unless said."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from torch import Tensor

from libemc.numerics import rotations as ro

ROUNDING = 1e-12
angle = st.floats(-360, 360)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(a: Tensor, b: object, tolerance: float = ROUNDING) -> bool:
    return bool(np.allclose(np.asarray(a), np.asarray(b), rtol=0, atol=tolerance))


def test_pose_is_the_inverse_of_the_intrinsic_zyz_rotation() -> None:
    angles = np.random.default_rng(1).uniform(-180, 180, (50, 3))
    ours = ro.matrix_from_euler(*torch.from_numpy(angles).T)
    assert close(ours, Rotation.from_euler("ZYZ", angles, degrees=True).inv().as_matrix())


def test_tilt_matrix_is_rz_ry_rx() -> None:
    angles = np.random.default_rng(2).uniform(-90, 90, (50, 3))
    ours = ro.tilt_matrices(*torch.from_numpy(angles).T)
    assert close(ours, Rotation.from_euler("ZYX", angles, degrees=True).as_matrix())
    # a point on +y of the specimen, tilt axis along y: it does not move; axis is counted from +y towards -x
    assert close(ro.tilt_matrices(0.0, 40.0) @ torch.tensor([0.0, 1, 0], dtype=torch.float64), [0, 1, 0])
    assert close(ro.tilt_matrices(90.0, 40.0) @ torch.tensor([0.0, 1, 0], dtype=torch.float64), [-1, 0, 0])
    # positive tilt carries +z to +x
    assert close(ro.tilt_matrices(0.0, 90.0) @ torch.tensor([0.0, 0, 1], dtype=torch.float64), [1, 0, 0])


def test_leading_dimensions_broadcast() -> None:
    matrices = ro.tilt_matrices(torch.zeros(4, 1), torch.arange(3), 1.5)
    assert matrices.shape == (4, 3, 3, 3) and matrices.dtype == torch.float64
    assert ro.matrix_from_rotvec(torch.zeros(2, 5, 3)).shape == (2, 5, 3, 3)


@settings(max_examples=60, deadline=None)
@given(angle, st.sampled_from([0.0, 180.0, 1e-7, 1e-13, 90.0]) | angle, angle)
def test_euler_round_trip(rot: float, tilt: float, psi: float) -> None:
    matrix = ro.matrix_from_euler(rot, tilt, psi)
    angles = ro.euler_from_matrix(matrix)
    assert close(ro.matrix_from_euler(*angles), matrix)
    assert 0 <= angles[1] <= 180


@settings(max_examples=60, deadline=None)
@given(angle, st.sampled_from([0.0, 90.0, -90.0]) | st.floats(-90, 90), angle)
def test_tilt_angles_round_trip(axis: float, tilt: float, xtilt: float) -> None:
    matrix = ro.tilt_matrices(axis, tilt, xtilt)
    angles = ro.tilt_angles_from_matrix(matrix)
    assert close(ro.tilt_matrices(*angles), matrix)
    assert abs(angles[1] - tilt) < 1e-5  # near 90 degrees the angle itself is only known to sqrt of rounding


def test_euler_of_a_turn_about_z_goes_to_psi() -> None:
    rot, tilt, psi = ro.euler_from_matrix(ro.matrix_from_euler(10.0, 0.0, 20.0))
    assert close(torch.stack((rot, tilt, psi)), [0, 0, 30])


def test_rotation_vectors_against_scipy() -> None:
    vectors = np.random.default_rng(3).normal(size=(200, 3)) * np.geomspace(1e-9, 60, 200)[:, None]
    matrices = Rotation.from_rotvec(vectors, degrees=True).as_matrix()
    assert close(ro.matrix_from_rotvec(torch.from_numpy(vectors)), matrices)
    back = ro.rotvec_from_matrix(torch.from_numpy(matrices))
    assert close(back, Rotation.from_matrix(matrices).as_rotvec(degrees=True), 1e-11)
    # relative, so that the smallest vectors (1e-9 degrees = 2e-11 rad, a matrix known to 1e-16) are tested too
    short = np.linalg.norm(vectors, axis=1) < 90
    error = np.linalg.norm(back.numpy() - vectors, axis=1)[short] / np.linalg.norm(vectors, axis=1)[short]
    assert error.max() < 1e-4


def test_half_turns_have_rotation_vectors() -> None:
    axes = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.6, 0, 0.8]], dtype=torch.float64)
    vectors = ro.rotvec_from_matrix(ro.matrix_from_rotvec(180 * axes))
    assert close((vectors * axes).sum(dim=-1).abs(), [180.0] * 4, 1e-6)  # a half turn is flat in w: sqrt of rounding


def test_series_and_closed_form_meet() -> None:
    for length in (np.rad2deg(np.sqrt(1e-3)) * f for f in (1 - 1e-9, 1 + 1e-9)):
        vector = length * np.array([0.6, 0.0, 0.8])
        assert close(
            ro.matrix_from_rotvec(torch.from_numpy(vector)),
            Rotation.from_rotvec(vector, degrees=True).as_matrix(),
            1e-15,
        )


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 100.0])
def test_gradients_of_rotation_vectors(scale: float) -> None:
    vector = (scale * torch.tensor([0.3, -0.5, 0.8], dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(ro.matrix_from_rotvec, (vector,))
    assert torch.autograd.gradgradcheck(ro.matrix_from_rotvec, (vector,))
    assert torch.autograd.gradcheck(lambda v: ro.rotvec_from_matrix(ro.matrix_from_rotvec(v)), (vector,), atol=1e-4)


def test_gradient_at_zero_is_the_generator() -> None:
    jacobian = torch.autograd.functional.jacobian(ro.matrix_from_rotvec, torch.zeros(3, dtype=torch.float64))
    expected = torch.zeros(3, 3, 3, dtype=torch.float64)
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        expected[k, j, i], expected[j, k, i] = 1.0, -1.0
    assert close(jacobian, torch.deg2rad(expected))


def test_gradients_of_tilt_matrices_at_zero() -> None:
    angles = tuple(torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(ro.tilt_matrices, angles)


def test_quaternions_against_scipy() -> None:
    reference = Rotation.random(300, random_state=4)
    reference = Rotation.concatenate([reference, Rotation.from_euler("XYZ", np.eye(3) * 180, degrees=True)])
    xyzw = reference.as_quat(canonical=True)
    wxyz = np.roll(xyzw, 1, axis=1)
    assert close(ro.matrix_from_quaternion(torch.from_numpy(3 * wxyz)), reference.as_matrix())
    ours = ro.quaternion_from_matrix(torch.from_numpy(reference.as_matrix()))
    assert close((ours.numpy() * wxyz).sum(1).__abs__(), np.ones(len(wxyz)))
    assert bool((ours[:, 0] >= 0).all())


def test_distance_is_scipys_magnitude_and_resolves_small_angles() -> None:
    a, b = ro.random_rotations(100, generator(5)), ro.random_rotations(100, generator(6))
    expected = np.degrees((Rotation.from_matrix(a).inv() * Rotation.from_matrix(b)).magnitude())
    assert close(ro.rotation_distance(a, b), expected, 1e-6)  # asin near 180 degrees: sqrt of rounding
    small = a @ ro.matrix_from_rotvec(torch.tensor([0.0, 1e-8, 0.0]))
    assert close(ro.rotation_distance(a, small), np.full(100, 1e-8), 1e-12)


def test_distance_between_equivalent_poses_is_zero() -> None:
    pose = ro.random_rotations(5, generator(7))
    equivalents = pose[:, None] @ ro.symmetry_matrices("o")
    assert float(ro.rotation_distance(pose[:, None], equivalents, "o").max()) < 1e-5
    assert float(ro.rotation_distance(pose[:, None], equivalents).max()) > 60
    # by definition the least over all equivalents, in any order of the arguments
    other = ro.random_rotations(5, generator(8))
    least = ro.rotation_distance(pose[:, None], other[:, None] @ ro.symmetry_matrices("d3")).amin(dim=1)
    assert close(ro.rotation_distance(pose, other, "d3"), least)
    assert close(ro.rotation_distance(other, pose, ro.symmetry_matrices("d3")), least, 1e-9)


def test_random_rotations_are_uniform_rotations() -> None:
    n = 20000
    matrices = ro.random_rotations(n, generator(9))
    assert close(matrices @ matrices.transpose(1, 2), np.broadcast_to(np.eye(3), (n, 3, 3)))
    assert close(torch.linalg.det(matrices), np.ones(n))
    # every entry of a uniform rotation has mean 0 and variance 1/3: 5 standard errors of each mean
    assert float(matrices.mean(dim=0).abs().max()) < 5 * (1 / 3 / n) ** 0.5
    # angle distribution: P(angle < a) = (a - sin a)/pi; Kolmogorov's 0.001 quantile is 1.95 / sqrt n
    angles = torch.deg2rad(ro.rotation_distance(matrices, torch.eye(3, dtype=torch.float64))).sort().values
    cdf = (angles - angles.sin()) / torch.pi
    assert float((cdf - torch.arange(n) / n).abs().max()) < 1.95 / n**0.5
    assert torch.equal(matrices, ro.random_rotations(n, generator(9)))
