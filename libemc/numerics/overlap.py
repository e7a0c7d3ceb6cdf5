"""What the other tilts say an image of a small object should look like, coefficient by coefficient.

Two central slices measure the same coefficients of an object of diameter D where they lie nearer to each other than about
1/D: near their common line and, for neighbouring tilts, far away from it too. The sum of the other slices, each counted by
this overlap, is the reprojection of the object's local tomogram without the image in question; here without ever making
that tomogram, which for a tilt series' few, small slices is faster and leaves an image out exactly. A test compares it with
insertion into, and extraction from, a Fourier volume.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numba
import numpy as np
import torch
from torch import Tensor

from libemc.numerics.slices import Band


@numba.njit(cache=True, nogil=True, fastmath=True, error_model="numpy")
def _predict(spectra, relative, common, gains, use, kx, ky, depth, sums, weights):  # type: ignore[no-untyped-def]  # pragma: no cover
    """See `predict`; spectra are (T, m, m/2 + 1, 2) with ky from -m/2, relative (T, T, 3, 2), common (T, T)."""
    count, rows, columns, _ = spectra.shape
    middle = rows // 2
    for j in range(count):
        if not use[j]:
            continue
        for i in range(count):
            if i == j or not use[i] or gains[i] <= 0:
                continue
            a = relative[j, i]
            gain = gains[i]
            for k in range(len(kx)):
                x, y = kx[k], ky[k]
                near = 1 - abs(depth * (a[2, 0] * x + a[2, 1] * y))
                if near <= 0:
                    continue
                u, v = 2 * (a[0, 0] * x + a[0, 1] * y), 2 * (a[1, 0] * x + a[1, 1] * y)
                sign = np.float32(1)
                if u < 0:
                    u, v, sign = -u, -v, np.float32(-1)
                c, r = int(u), math.floor(v)
                fu, fv = u - c, v - r
                r += middle
                if c + 1 >= columns or r < 0 or r + 1 >= rows:
                    continue
                w00, w01 = (1 - fu) * (1 - fv), fu * (1 - fv)
                w10, w11 = (1 - fu) * fv, fu * fv
                near *= common[j, i] * gain
                s = spectra[i]
                re = w00 * s[r, c, 0] + w01 * s[r, c + 1, 0] + w10 * s[r + 1, c, 0] + w11 * s[r + 1, c + 1, 0]
                im = w00 * s[r, c, 1] + w01 * s[r, c + 1, 1] + w10 * s[r + 1, c, 1] + w11 * s[r + 1, c + 1, 1]
                sums[j, k, 0] += near * re
                sums[j, k, 1] += near * im * sign
                weights[j, k] += near * near


@dataclass(frozen=True)
class Overlap:
    """How much two images of an object have in common: the correlation of their coefficients, without noise.

    It falls to nothing where the slices are 1/depth apart. And where the object is cut out of a layer that is thicker
    than it, columns of the layer at an angle to each other cross in a part of themselves only.

    Attributes:
        depth: of the object along the beam, in boxes.
        width: across the beam, in boxes; infinite for a lone object.
    """

    depth: float
    width: float = math.inf

    def common(self, matrices: Tensor) -> Tensor:
        """(T, T) float32: what the columns seen in two images share, 0 to 1."""
        cosine = (matrices[:, 2] @ matrices[:, 2].T).clamp(1e-3, 1)
        apart = self.depth / 2 * (1 / cosine**2 - 1).clamp_min(0).sqrt() / self.width
        return torch.where(apart < 1, 1 - apart / 2, 1 / (2 * apart.clamp_min(1))).float()


@numba.njit(cache=True, nogil=True, fastmath=True, error_model="numpy")
def _couple(relative, common, gains, use, kx, ky, depth, weight, out):  # type: ignore[no-untyped-def]  # pragma: no cover
    """out[j, i] = Σ_k overlap² · gain[i]² · weight[j, k] · (kx², kx·ky, ky²)."""
    count = len(gains)
    for j in range(count):
        if not use[j]:
            continue
        for i in range(count):
            if i == j or not use[i] or gains[i] <= 0:
                continue
            a, b = relative[j, i, 2, 0] * depth, relative[j, i, 2, 1] * depth
            xx, xy, yy = np.float32(0), np.float32(0), np.float32(0)
            for k in range(len(kx)):
                x, y = kx[k], ky[k]
                near = max(1 - abs(a * x + b * y), np.float32(0))
                near *= near * weight[j, k]
                xx += near * x * x
                xy += near * x * y
                yy += near * y * y
            gain = (common[j, i] * gains[i]) ** 2
            out[j, i, 0], out[j, i, 1], out[j, i, 2] = gain * xx, gain * xy, gain * yy


def predict(
    spectra: Tensor, matrices: Tensor, band: Band, overlap: Overlap, gains: Tensor, use: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What the others say about each image of an object.

    Args:
        spectra: (T, m, m//2+1) complex64, rfft layout, of the images around the object's projection, zero-padded to m, twice
            the band's box n; the origin of real space, where the object's centre is seen, at pixel 0.
        matrices: (T, 3, 3) specimen to image frame.
        band: of the box n.
        overlap: how much two images have in common.
        gains: (T,) amplitude of the signal in each image, where its noise has power 1.
        use: (T,) bool: the others are passed over, and get zeros.

    Returns:
        values: (T, K) complex64 of the images themselves; sums: (T, K) complex64, Σ overlap·gain·value over all other images;
        weights: (T, K) float32, Σ (overlap·gain)². With noise power 1 and signal power S the image's own coefficient,
        over its gain, is expected at sums / (weights + 1/S).
    """
    count, m = len(spectra), spectra.shape[-2]
    shifted = torch.fft.fftshift(spectra, dim=-2).contiguous()
    relative = torch.einsum("iab,jcb->jiac", matrices, matrices)[..., :2].float().contiguous()
    sums = torch.zeros(count, len(band.kx), dtype=torch.complex64)
    weights = torch.zeros(count, len(band.kx))
    _predict(
        torch.view_as_real(shifted).numpy(),
        relative.numpy(),
        overlap.common(matrices).numpy(),
        gains.float().numpy(),
        use.numpy(),
        band.kx.float().numpy(),
        band.ky.float().numpy(),
        np.float32(overlap.depth),
        torch.view_as_real(sums).numpy(),
        weights.numpy(),
    )
    return shifted[:, m // 2 + 2 * band.ky, 2 * band.kx], sums, weights


def couplings(
    matrices: Tensor, band: Band, overlap: Overlap, gains: Tensor, use: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """How firmly each pair of images is held together by what `predict` compares.

    Displacements e of the images (px, of a landmark from where it was cut out) change the comparison of image j with its
    prediction like e_j - Σ_i share_ji Aᵀ e_i: the others move the prediction by their share in it. A point that
    moves in space moves all its images and no comparison.

    Args:
        weight: (T, K) what a coefficient of image j tells about its displacement, over the sum of weights of `predict`.

    Returns:
        (T, T, 2, 2) of [j, i]: Σ_k (overlap·gain)²·weight·k kᵀ; and A (T, T, 2, 2): coordinates of image j's Fourier plane
        to those of image i's.
    """
    relative = torch.einsum("iab,jcb->jiac", matrices, matrices)[..., :2].contiguous()
    count = len(matrices)
    out = torch.zeros(count, count, 3)
    _couple(
        relative.float().numpy(),
        overlap.common(matrices).numpy(),
        gains.float().numpy(),
        use.numpy(),
        band.kx.float().numpy(),
        band.ky.float().numpy(),
        np.float32(overlap.depth),
        weight.float().contiguous().numpy(),
        out.numpy(),
    )
    return out[..., [0, 1, 1, 2]].reshape(count, count, 2, 2).double(), relative[:, :, :2]
