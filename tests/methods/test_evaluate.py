"""Errors against the truth: zero for what cannot be told apart from it, known for what was put in, and what an
independent program says."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from libemc.errors import InputError
from libemc.methods import evaluate, phantom
from libemc.methods.evaluate import RigidMotion
from libemc.methods.subtilts import Field, TiltGeometry
from libemc.numerics.rotations import (
    matrix_from_rotvec,
    random_rotations,
    rotation_distance,
    tilt_angles_from_matrix,
    tilt_matrices,
)
from libemc.numerics.symmetry import symmetry_matrices

TILTS = torch.arange(-60.0, 61.0, 4.0, dtype=torch.float64)
FIELD, THICKNESS, SLAB = (2400.0, 2000.0), 700.0, (2.0, -3.0)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def geometry(seed: int = 0) -> TiltGeometry:
    noise = torch.randn(4, len(TILTS), generator=generator(seed), dtype=torch.float64)
    matrices = tilt_matrices(85.3 + 0.2 * noise[0], TILTS + 0.1 * noise[1], 0.5)
    return TiltGeometry(matrices, 30 * noise[2:].T, torch.ones(len(TILTS)).double(), torch.ones(len(TILTS)).bool())


def moved(truth: TiltGeometry, motion: RigidMotion) -> TiltGeometry:
    """The geometry that sees in the same place what was moved: T Q⁻¹ (Q r + t) + (s - (T Q⁻¹ t)) = T r + s."""
    matrices = truth.matrices @ motion.rotation.T
    return replace(truth, matrices=matrices, shift=truth.shift - (matrices @ motion.shift)[:, :2])


def some_motion(degrees: float = 20.0, hand: float = 1.0) -> RigidMotion:
    turn = matrix_from_rotvec(degrees / 3**0.5 * torch.tensor([1.0, -1.0, 1.0]).double())
    turn = turn @ torch.diag(torch.tensor([1.0, 1.0, hand]).double())
    return RigidMotion(turn, torch.tensor([40.0, -25.0, 60.0]).double())


def points() -> Tensor:
    return evaluate.slab_points(*FIELD, THICKNESS, SLAB)


# ------------------------------------------------------------------------------------------------------------ alignment


def test_points_have_the_moments_of_the_slab() -> None:
    p = evaluate.slab_points(*FIELD, THICKNESS)
    side = evaluate.INNER * torch.tensor([*FIELD, THICKNESS]).double()
    assert torch.allclose(p.mean(dim=0), torch.zeros(3).double(), atol=1e-10)
    assert torch.allclose(p.T @ p / 8, torch.diag(side**2 / 12))  # of a uniform distribution


@pytest.mark.parametrize("degrees", [0.0, 20.0, 175.0])
def test_a_moved_specimen_is_no_error(degrees: float) -> None:
    truth, motion = geometry(), some_motion(degrees)
    error = evaluate.alignment_error(moved(truth, motion), truth, points())
    # exact but for rounding: float64 at 1e3 Å
    assert error.rms < 1e-8 and float(error.angles.max()) < 1e-8
    assert torch.allclose(error.motion.rotation, motion.rotation, atol=1e-10)
    assert torch.allclose(error.motion.shift, motion.shift, atol=1e-7)
    assert not error.mirrored and error.mirrored_rms > 50


def test_the_other_hand_is_told() -> None:
    """z to -z of the specimen: all tilts of the other sign, as seen by one who has the hand wrong."""
    truth = geometry()
    error = evaluate.alignment_error(moved(truth, some_motion(10.0, hand=-1.0)), truth, points())
    assert error.mirrored and error.mirrored_rms < 1e-8 and error.rms > 50


def test_random_shifts_come_out_as_they_went_in() -> None:
    """Per component of s Å a tilt's error is s·√2, less what the motion takes up: 6 of 2·31 numbers, so 5 % of it."""
    truth = geometry()
    wrong = torch.randn(len(TILTS), 2, generator=generator(5), dtype=torch.float64) * 3
    error = evaluate.alignment_error(replace(truth, shift=truth.shift + wrong), truth, points())
    put_in = float(wrong.square().sum(dim=1).mean().sqrt())
    assert 0.88 * put_in < error.rms < put_in  # 6 of 62 taken up: 5 % expected, 12 % at most
    assert error.median < error.tilts[error.worst]


def test_a_stretched_image_and_one_that_is_left_out() -> None:
    truth = geometry()
    use = truth.use.clone()
    use[7] = False
    magnified = torch.full_like(truth.magnification, 1.002)
    shift = truth.shift.clone()
    shift[7] += 500
    found = replace(truth, magnification=magnified, shift=shift, use=use)
    error = evaluate.alignment_error(found, truth, points())
    # 0.2 % of the distance from the image centre, which no rotation or shift makes up for; those of the shifts remain
    seen = truth.project(points())[0][:, use]
    assert error.rms == pytest.approx(0.002 * float(seen.square().sum(dim=2).mean().sqrt()), rel=0.05)
    assert math.isnan(error.tilts[7]) and int(error.tilts.isnan().sum()) == 1 and error.worst != 7


def test_a_specimen_that_moved_within_itself() -> None:
    """Sheared by a·x·y along x in one image: no motion explains it; the field that says so, at its nodes, does."""
    truth, p = geometry(), points()
    seen, bend = truth.project(p)[0], torch.zeros(len(TILTS), 9, 2, dtype=torch.float64)
    half = torch.tensor([1500.0, 1200.0], dtype=torch.float64)
    bent = seen.clone()
    bent[:, 12, 0] += 16 * seen[:, 12].prod(dim=1) / half.prod()
    bend[12, :, 0] = 16 * torch.tensor([1.0, 0, -1, 0, 0, 0, -1, 0, 1])  # x·y at the nodes; a bilinear spline of three
    error = evaluate.alignment_error(truth, truth, p, bent)
    # one image of 31 turns the motion by a thirtieth at the most
    size = float((bent - seen)[:, 12].square().sum(dim=1).mean().sqrt())
    assert size > 2 and error.worst == 12 and float(error.tilts[12]) == pytest.approx(size, rel=0.05)
    field = Field(bend, (2 * float(half[0]), 2 * float(half[1])), 3, 3)
    assert evaluate.alignment_error(replace(truth, deformation=field), truth, p, bent).rms < 1e-8


def test_the_mirror_images_tilts() -> None:
    """A single stretched tilt, seen by one who has the hand wrong, is as far off as with the right hand."""
    truth = geometry()
    magnification = truth.magnification.clone()
    magnification[20] = 1.003
    errors = [
        evaluate.alignment_error(
            replace(moved(truth, some_motion(10.0, hand=h)), magnification=magnification), truth, points()
        )
        for h in (1.0, -1.0)
    ]
    # the mirrored points are other points, with the same moments: exact but for rounding
    assert torch.allclose(errors[0].tilts, errors[1].mirrored_tilts, atol=1e-3) and float(errors[0].tilts[20]) > 1.0


def test_one_bad_tilt_does_not_turn_the_others() -> None:
    truth = geometry()
    shift = truth.shift.clone()
    shift[3] += torch.tensor([400.0, 0.0])
    error = evaluate.alignment_error(replace(truth, shift=shift), truth, points())
    assert error.worst == 3 and float(error.tilts[3]) > 380
    assert error.median < 5  # the pull of a tilt in the pseudo-Huber loss is that of ROBUST = 20 Å, on 31 tilts


def test_what_cannot_be_compared() -> None:
    truth = geometry()
    short = TiltGeometry(truth.matrices[1:], truth.shift[1:], truth.magnification[1:], truth.use[1:])
    with pytest.raises(InputError, match="30 tilts cannot be compared with 31"):
        evaluate.alignment_error(short, truth, points())
    with pytest.raises(InputError, match="fewer than two"):
        evaluate.alignment_error(replace(truth, use=~truth.use), truth, points())


@pytest.fixture(scope="module")
def independent(shared_data: Path) -> ModuleType:
    file = shared_data.parent / "tools" / "alignment_error.py"
    if not file.is_file():
        pytest.skip("the independent measure is not beside the test data")
    spec = importlib.util.spec_from_file_location("alignment_error", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("hand", [1.0, -1.0])
def test_agrees_with_an_independent_measure(independent: ModuleType, hand: float) -> None:
    truth = geometry(1)
    noise = torch.randn(3, len(TILTS), generator=generator(2), dtype=torch.float64)
    angles = tilt_angles_from_matrix(truth.matrices)
    turned = tilt_matrices(angles[0] + 0.3 * noise[0] + 1.0, hand * (angles[1] + 0.5 * noise[1]), angles[2] - 0.7)
    shift = truth.shift + 5 * noise[2][:, None]
    found = replace(truth, matrices=turned, shift=shift)
    axis, tilt, xtilt = (a.tolist() for a in tilt_angles_from_matrix(turned))
    record = {
        "tilts": {"use": [True] * len(TILTS)},
        "alignment": {"axis": axis, "tilt": tilt, "xtilt": xtilt,
                      "shift_x": shift[:, 0].tolist(), "shift_y": shift[:, 1].tolist()},
    }  # fmt: skip
    known = {"axis": angles[0].tolist(), "tilt": angles[1].tolist(), "xtilt": 0.5, "shift_A": truth.shift.tolist(),
             "field_A": list(FIELD), "thick": THICKNESS, "slab_tilt": list(SLAB)}  # fmt: skip
    theirs = independent.error(record, known, n=250)
    ours = evaluate.alignment_error(found, truth, points())
    assert ours.mirrored == theirs["mirrored"] == (hand < 0)
    if hand > 0:
        # 250 random points against exact moments: 5 % of the variance; theirs weighs components, ours tilts
        assert ours.rms == pytest.approx(theirs["rms"], rel=0.05)
        assert ours.median == pytest.approx(theirs["median"], rel=0.1)
        assert ours.worst == theirs["worst_tilt"]
    assert ours.mirrored_rms == pytest.approx(theirs["rms_if_mirrored"], rel=0.1)


# ---------------------------------------------------------------------------------------------------------------- poses


def test_poses_are_compared_after_the_motion_and_modulo_symmetry() -> None:
    count, motion = 12, some_motion(35.0)
    true_xyz = (torch.rand(count, 3, generator=generator(3), dtype=torch.float64) - 0.5) * 2000
    true = random_rotations(count, generator(4))
    off = matrix_from_rotvec(torch.tensor([3.0, 0.0, 4.0]).double())  # 5 degrees
    equivalent = symmetry_matrices("c7")[3]
    order = torch.randperm(count, generator=generator(6))
    rotation = (motion.rotation @ true @ off @ equivalent)[order]
    xyz = motion(true_xyz + torch.tensor([0.0, 6.0, 8.0]).double())[order]
    xyz[0] += 500  # nobody's
    errors = evaluate.pose_errors((rotation, xyz), (true, true_xyz), 60.0, "c7", motion)
    assert errors.true.tolist() == order[1:].tolist() and errors.found.tolist() == list(range(1, count))
    assert torch.allclose(errors.distance, torch.full_like(errors.distance, 10.0))
    expected = rotation_distance(torch.eye(3).double(), off @ equivalent, "c7")
    assert torch.allclose(errors.angle, expected.expand(count - 1), atol=1e-9) and float(expected) < 5.001


def test_a_near_pair_is_not_drawn_apart() -> None:
    """Nearest first would give the first particle the second truth and leave the second with none."""
    eye = torch.eye(3).double().expand(2, 3, 3)
    true = torch.tensor([[0.0, 0, 0], [20.0, 0, 0]]).double()
    found = torch.tensor([[11.0, 0, 0], [29.0, 0, 0]]).double()
    errors = evaluate.pose_errors((eye, found), (eye, true), 15.0)
    assert errors.true.tolist() == [0, 1] and errors.distance.tolist() == [11.0, 9.0]


# ----------------------------------------------------------------------------------------------------------------- maps


def test_map_agreement_finds_resolution_and_hand() -> None:
    truth = phantom.density(phantom.particle(), 48, 8.0)
    noise = torch.randn(truth.shape, generator=generator(7)) * truth.std() * 3
    same = evaluate.map_agreement(truth + noise, truth, 8.0)
    # white noise of power N on a signal of S: FSC = 1/sqrt(1 + N/S), which is 0.5 where S = N/3
    k = np.fft.fftfreq(48, 1 / 48)
    shell = np.rint(np.sqrt(sum(g**2 for g in np.meshgrid(k, k, k, indexing="ij")))).astype(int).ravel()
    power = np.bincount(shell, np.abs(np.fft.fftn(truth.numpy())).ravel() ** 2)[:25] / np.bincount(shell)[:25]
    predicted = 1 / np.sqrt(1 + float(noise.var()) * 48**3 / power)
    crossing = int(np.flatnonzero(predicted[1:] < 0.5)[0]) + 1
    assert 5 < crossing < 20
    assert same.resolution == pytest.approx(48 * 8.0 / crossing, rel=1.5 / crossing)  # within a shell and a half
    assert same.right_hand and same.correlation == pytest.approx(1 / math.sqrt(1 + 3**2), abs=0.02)
    for mirror in ((0,), (1,), (2,), (0, 1, 2)):
        other = torch.roll(truth.flip(mirror), (1,) * len(mirror), mirror) + noise
        found = evaluate.map_agreement(other, truth, 8.0)
        assert not found.right_hand and found.mirrored == pytest.approx(same.correlation, abs=0.02)
    assert evaluate.map_agreement(truth, truth, 8.0, mask=(truth > 0.2).float()).correlation == pytest.approx(1.0)
