"""peaks: quadratics are found exactly, Gaussians nearly, neighbours are kept apart as asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from libemc.numerics.peaks import find_peaks, highest_peak, vertex


def quadratic(shape: tuple[int, ...], top: np.ndarray, curvature: np.ndarray, height: float = 3.0) -> torch.Tensor:
    """height - ½ (r - top)ᵀ curvature (r - top) over index coordinates r = (x, y[, z])."""
    r = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")[::-1], axis=-1) - top
    return torch.from_numpy(height - 0.5 * np.einsum("...i,ij,...j->...", r, curvature, r))


def gaussians(shape: tuple[int, ...], tops: np.ndarray, heights: np.ndarray, sigma: float) -> torch.Tensor:
    r = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")[::-1], axis=-1)
    return torch.from_numpy(
        sum(h * np.exp(-((r - t) ** 2).sum(-1) / (2 * sigma**2)) for t, h in zip(tops, heights, strict=True))
    )


def test_tilted_paraboloids_are_exact() -> None:
    """Cross terms included: rounding only."""
    flat = quadratic((12, 15), np.array([7.3, 4.6]), np.array([[1.0, 0.6], [0.6, 0.9]]))
    other = quadratic((12, 15), np.array([5.0, 6.2]), np.array([[0.3, -0.1], [-0.1, 0.2]]), height=-1.0)
    position, height = highest_peak(torch.stack([flat, other]))
    assert np.allclose(position, [[7.3, 4.6], [5.0, 6.2]], atol=1e-9) and np.allclose(height, [3.0, -1.0])
    curvature = np.array([[1.0, 0.3, 0.1], [0.3, 0.8, -0.2], [0.1, -0.2, 0.5]])
    position, height = highest_peak(quadratic((9, 10, 11), np.array([6.2, 4.9, 3.7]), curvature), ndim=3)
    assert position.shape == (3,) and np.allclose(position, [6.2, 4.9, 3.7], atol=1e-9) and np.isclose(height, 3.0)


def test_leading_dimensions_are_kept() -> None:
    position, height = highest_peak(torch.randn(2, 3, 8, 9))
    assert position.shape == (2, 3, 2) and height.shape == (2, 3) and position.dtype == torch.float64


def test_peaks_on_the_border_stay_there() -> None:
    image = torch.zeros(6, 7)
    image[0, 3], image[1, 3], image[0, 4] = 2.0, 1.5, 1.0
    position, height = highest_peak(image)
    assert position.tolist() == [3.0, 0.0] and height == 2.0


def test_constant_and_single_pixel_maps_do_not_fail() -> None:
    assert highest_peak(torch.ones(4, 5))[1] == 1
    assert highest_peak(torch.ones(1, 1))[0].tolist() == [0, 0]
    assert len(find_peaks(torch.ones(4, 5), 2.0)[0]) == 0


@pytest.mark.parametrize("shape", [(40, 50), (24, 30, 36)])
def test_gaussians_are_found_in_order(shape: tuple[int, ...]) -> None:
    d = len(shape)
    tops = np.array([[8.3, 9.2, 7.6], [25.7, 8.1, 15.4], [9.4, 18.6, 16.2], [27.2, 21.5, 8.8]])[:, :d]
    heights = np.array([2.0, 5.0, 3.0, 4.0])
    positions, values = find_peaks(gaussians(shape, tops, heights, 2.0), 1.0)
    order = [1, 3, 2, 0]
    # a parabola through three samples of a Gaussian of sigma 2 errs by less than 0.02 px and 0.3 % a pixel off centre
    assert np.allclose(positions, tops[order], atol=0.03) and np.allclose(values, heights[order], rtol=0.02)
    assert len(find_peaks(gaussians(shape, tops, heights, 2.0), 2.5)[0]) == 3
    assert np.allclose(find_peaks(gaussians(shape, tops, heights, 2.0), 1.0, limit=2)[0], positions[:2])


def test_distance_keeps_the_higher_of_two() -> None:
    image = torch.zeros(20, 20)
    image[5, 5], image[5, 9], image[5, 13] = 3.0, 2.0, 1.0
    x = find_peaks(image, 0.5)[0][:, 0].tolist()
    assert x == [5, 9, 13]
    assert find_peaks(image, 0.5, distance_px=4.0)[0][:, 0].tolist() == [5, 9, 13]  # exactly at the distance: kept
    assert find_peaks(image, 0.5, distance_px=4.5)[0][:, 0].tolist() == [5, 13]  # a dropped peak drops no others
    assert find_peaks(image, 0.5, distance_px=9.0)[0][:, 0].tolist() == [5]


def test_all_peaks_of_noise_against_a_loop() -> None:
    noise = torch.randn(14, 15, 16, generator=torch.Generator().manual_seed(0))
    array = noise.numpy()
    expected = []
    for z, y, x in np.ndindex(array.shape):
        around = array[max(z - 1, 0) : z + 2, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
        if array[z, y, x] > 0.5 and array[z, y, x] == around.max():
            expected.append((x, y, z))
    positions, values = find_peaks(noise, 0.5)
    assert len(positions) == len(expected) > 50
    offset = positions[:, None] - torch.tensor(expected)
    assert bool((offset.abs().amax(dim=2).amin(dim=1) <= 1).all())
    assert bool((values >= 0.5).all())


@pytest.mark.parametrize("place", [-0.5, -0.2, 0.0, 0.31])
def test_the_vertex_of_a_parabola_is_exact(place: float) -> None:
    assert vertex(*(3.0 - 2.0 * (x - place) ** 2 for x in (-1, 0, 1))) == pytest.approx(place)


def test_a_vertex_stays_by_the_middle() -> None:
    assert vertex(2.0, 1.0, 2.0) == 0.0  # bent upwards
    assert vertex(1.0, 1.0, 1.0) == 0.0
    assert vertex(0.0, 1.0, 1.9) == 0.5  # beyond half a step
    assert vertex(1.9, 1.0, 0.0) == -0.5
