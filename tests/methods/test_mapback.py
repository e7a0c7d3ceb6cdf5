"""Maps placed back: against Gaussians in closed form, whatever box and voxels; surfaces against what they enclose."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from libemc.errors import InputError
from libemc.methods import mapback
from libemc.methods.mapback import Poses
from libemc.methods.reconstruct import Grid
from libemc.numerics.rotations import matrix_from_euler
from tests.by_hand import CENTRES, HEIGHTS, WIDTHS, blobs_map, line

# by hand, in `by_hand`: pose(20, 65, -40) and pose(130, 100, 77)
ANGLES = (torch.tensor([20.0, 130.0]), torch.tensor([65.0, 100.0]), torch.tensor([-40.0, 77.0]))
PLACES = torch.tensor([[3.3, -4.1, 2.2], [11.0, 16.0, -3.7]], dtype=torch.float64)
POSES = Poses(matrix_from_euler(*ANGLES), PLACES)
SHAPE = (40, 45, 51)


def by_hand(grid: Grid, hand: int = 1) -> np.ndarray:
    """Convention 8 in closed form: blobs at x + R·u, in a volume whose voxel v lies at centre + A·v."""
    turn, centre = grid.rotation.numpy(), np.array(grid.centre)
    z, y, x = (line(n, grid.pixel_size) for n in grid.shape)
    out = np.zeros(grid.shape)
    for rotation, place in zip(POSES.rotation.numpy(), PLACES.numpy(), strict=True):
        blobs = ((CENTRES * (1, 1, hand)) @ rotation.T + place - centre) @ turn
        for (cx, cy, cz), width, height in zip(blobs, WIDTHS, HEIGHTS, strict=True):
            gx, gy, gz = (np.exp(-((a - c) ** 2) / (2 * width**2)) for a, c in ((x, cx), (y, cy), (z, cz)))
            out += height * gz[:, None, None] * gy[:, None] * gx
    return out


def placed(box: int, pixel: float, grid: Grid, masked: bool = True) -> np.ndarray:
    cut = mapback.cut(torch.from_numpy(blobs_map(box, pixel)).float(), pixel, masked)
    return mapback.placed(mapback.model(cut, grid.pixel_size), grid, POSES).numpy()


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("box", "pixel"), [(32, 2.0), (33, 2.0), (64, 1.2), (45, 1.5), (24, 2.6)])
def test_blobs_at_poses(box: int, pixel: float, masked: bool) -> None:
    """Even and odd boxes of other pixels than the volume's, off the voxels: the closed form to 0.3 % of its peak.

    At 2 Å the narrowest blob, 3.2 Å wide, has 4e-6 of its transform at Nyquist; the cubic spline leaves the rest. A mirrored
    particle, and half a voxel, are farther off than that by two orders.
    """
    grid = Grid(SHAPE, 2.0)
    found, wanted = placed(box, pixel, grid, masked), by_hand(grid)
    limit = 3e-3 * wanted.max()
    assert np.abs(found - wanted).max() < limit
    assert np.abs(found - by_hand(grid, hand=-1)).max() > 100 * limit
    shifted = by_hand(Grid(SHAPE, 2.0, (1.0, 0.0, 0.0)))
    assert np.abs(found - shifted).max() > 50 * limit


def test_coarse_voxels_hold_what_they_can() -> None:
    """At 4 Å the blobs are less wide than a voxel; what is below 0.8 of Nyquist is there, and nothing beyond."""
    grid = Grid((24, 28, 32), 4.0)
    found, wanted = placed(48, 1.5, grid), by_hand(grid)
    k = [np.abs(np.fft.fftfreq(n)) for n in grid.shape]
    radius = np.sqrt(k[0][:, None, None] ** 2 + k[1][:, None] ** 2 + k[2] ** 2)
    one, other = np.fft.fftn(found), np.fft.fftn(wanted)
    low = radius < 0.35  # below, what the blobs alias is small
    assert np.abs(one - other)[low].max() < 0.02 * np.abs(other).max()
    assert (np.abs(one[radius > 0.55]) ** 2).sum() < 1e-4 * (np.abs(one) ** 2).sum()


def test_a_part_turned_about_its_middle() -> None:
    """A volume of a part of the specimen, its axes turned (convention 6)."""
    grid = Grid((30, 36, 41), 2.0, (8.0, -6.0, 4.0), (30.0, 50.0, -20.0))
    found, wanted = placed(32, 2.0, grid), by_hand(grid)
    assert np.abs(found - wanted).max() < 3e-3 * wanted.max()


def test_rows_and_threads_change_nothing() -> None:
    grid = Grid(SHAPE, 2.0)
    model = mapback.model(mapback.cut(torch.from_numpy(blobs_map(32)).float(), 2.0), 2.0)
    whole = mapback.placed(model, grid, POSES)
    for rows in (7, 45):
        blocks = dict(mapback.placed_rows(model, grid, POSES, rows))
        assert torch.equal(torch.cat([blocks[y] for y in sorted(blocks)], dim=1), whole)


def test_inside_and_from_the_corner() -> None:
    """The voxels of a volume are from -0.5 to n - 0.5; its first voxel is (0, 0, 0) Å."""
    grid = Grid((8, 10, 12), 5.0, (100.0, 0.0, 0.0))
    edges = torch.tensor([[100 - 32.4, 0, 0], [100 - 32.6, 0, 0], [100 + 27.4, 0, 0], [100, -27.4, 0], [100, 0, 17.6]])
    poses = Poses(torch.eye(3, dtype=torch.float64).expand(5, 3, 3), edges.double())
    assert poses.inside(grid).tolist() == [True, False, True, True, False]
    np.testing.assert_allclose(poses.from_corner(grid).xyz[0], [-32.4 + 30, 25, 20], atol=1e-5)


def test_the_noise_around_is_not_placed() -> None:
    """A noisy box: without its mask the corners show, with it there is nothing beyond the particle."""
    noise = torch.from_numpy(np.random.default_rng(1).normal(0, 0.05, (48,) * 3)).float()
    density = torch.from_numpy(blobs_map(48)).float() + noise
    grid = Grid((60, 60, 60), 2.0)
    at = Poses(torch.eye(3, dtype=torch.float64)[None], torch.zeros(1, 3, dtype=torch.float64))
    far = mapback.centred_radius(grid.shape) * 2.0 > 60
    left = [
        float(mapback.placed(mapback.model(mapback.cut(density, 2.0, masked), 2.0), grid, at)[far].abs().max())
        for masked in (True, False)
    ]
    assert left[0] < 1e-6 and left[1] > 0.05


def test_no_particle() -> None:
    """A black ball that fills the middle: nothing white stands out there."""
    noise = np.random.default_rng(1).normal(0, 0.01, (32,) * 3)
    z, y, x = np.indices((32,) * 3) - 16
    black = noise - np.exp(-(x**2 + y**2 + z**2) / 200)
    with pytest.raises(InputError):
        mapback.cut(torch.from_numpy(black).float(), 2.0)


def test_a_mesh_encloses_the_particle() -> None:
    """Closed, outwards, and of the volume of the cut; where the map at a vertex is, it has the level."""
    cut = mapback.cut(torch.from_numpy(blobs_map(33)).float(), 2.0)
    model = mapback.model(cut, 2.0)
    mesh = mapback.surface(model)
    assert mesh.volume() == pytest.approx(cut.volume, rel=0.02)  # a voxel of the cut is in or out
    edges = np.sort(np.concatenate([mesh.triangles[:, [a, b]] for a, b in ((0, 1), (1, 2), (2, 0))]), axis=1)
    assert (np.unique(edges, axis=0, return_counts=True)[1] == 2).all()
    d = mesh.vertices[:, None].astype(np.float64) - CENTRES
    values = (HEIGHTS * np.exp(-(d**2).sum(-1) / (2 * WIDTHS**2))).sum(1)
    np.testing.assert_allclose(values, model.level, atol=0.02 * model.density.max())
    slope = -(HEIGHTS / WIDTHS**2 * np.exp(-(d**2).sum(-1) / (2 * WIDTHS**2)))[..., None] * d
    out = -slope.sum(1) / np.linalg.norm(slope.sum(1), axis=1, keepdims=True)
    assert np.median((out * mesh.normals).sum(1)) > 0.97


def test_seen_from_above_and_from_the_front() -> None:
    """A ball of a smooth density: depth, normal and place of its surface are those of a sphere."""
    grid = Grid((40, 50, 60), 1.0)
    middle, radius = np.array([28.0, 22.0, 18.0]), 12.0  # x, y, z in voxels
    z, y, x = np.indices(grid.shape)
    distance = np.sqrt((x - middle[0]) ** 2 + (y - middle[1]) ** 2 + (z - middle[2]) ** 2)
    volume = torch.from_numpy((radius - distance).astype(np.float32))
    for side in ("top", "front"):
        sight = mapback.seen(volume, 0.0, side)
        hit = np.isfinite(sight.depth)
        assert hit.sum() == sum(a**2 + b**2 < radius**2 for a in range(-12, 13) for b in range(-12, 13))
        out = (sight.index[hit] - middle) / radius
        inner = np.abs(out[:, 2] if side == "top" else out[:, 1]) > 0.3
        assert np.abs(np.linalg.norm(out[inner], axis=1) - 1).max() < 0.02
        view = out if side == "top" else out[:, [0, 2, 1]] * (1, 1, -1)  # right, up, towards the viewer
        assert ((view * sight.normal[hit]).sum(1)[inner] > 0.99).all()
        nearest = (39 - 30.0) if side == "top" else 10.0
        assert sight.depth.min() == pytest.approx(nearest, abs=0.05)
        row, column = np.unravel_index(sight.depth.argmin(), sight.depth.shape)
        assert (row, column) == ((22, 28) if side == "top" else (18, 28))
    other = dataclasses.replace(sight, depth=sight.depth + np.where(np.arange(60) < 28, -1, 1).astype(np.float32))
    both, front = mapback.nearer(sight, other)
    assert (front[hit] == (np.nonzero(hit)[1] < 28)).all()
    assert (both.depth[hit] == np.minimum(sight.depth, other.depth)[hit]).all()
