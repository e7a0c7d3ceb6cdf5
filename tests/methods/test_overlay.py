"""Maps laid over each other: a known turn and shift is found, a mirror image is another map."""

from __future__ import annotations

import pytest
import torch

from libemc.methods.overlay import overlay
from libemc.methods.postprocess import mirror, place
from libemc.numerics.rotations import random_rotations, rotation_distance
from tests.methods.subtilt_data import blobs


@pytest.mark.parametrize("box", [32, 35])
def test_a_known_turn_and_shift(box: int) -> None:
    density = blobs(box)
    for seed in range(2):
        rotation = random_rotations(1, torch.Generator().manual_seed(seed))[0]
        shift = torch.tensor([1.5, -0.8, 2.1], dtype=torch.float64)
        moved = place(density, rotation, shift.tolist())  # at R·u + s it is the density at u
        found = overlay(density, moved, 9.0, 4.0)
        assert float(rotation_distance(found.rotation, rotation)) < 1.5
        assert float((found.shift - shift).norm()) < 0.2
        assert found.correlation > 0.98
        again = place(density, found.rotation, found.shift.tolist())
        assert float(torch.corrcoef(torch.stack([again.reshape(-1), moved.reshape(-1)]))[0, 1]) > 0.97


def test_a_mirror_image_is_another_map() -> None:
    density = blobs(24, seed=8, count=8)
    assert overlay(density, density, 6.4, 3.0).correlation > 0.99
    assert overlay(mirror(density, "z"), density, 6.4, 3.0).correlation < 0.88
