"""Which images are given up when beads have been followed."""

from __future__ import annotations

import numpy as np

from libemc.methods.align.by_gold import MISFIT, misfits


def test_images_whose_beads_lie_elsewhere() -> None:
    """Far by both measures, in the middle of its beads; not by one bead alone, nor where nothing was measured."""
    residual = np.zeros((9, 5, 2))
    residual[..., 0] = 0.4
    residual[3] = np.nan
    residual[4, 0, 0] = 500.0
    residual[5, :, 1] = 30.0
    residual[6, :, 1] = 30.0
    use = [j != 6 for j in range(9)]
    (found,) = misfits(residual, use, 6.0)
    assert found[0] == 5
    assert abs(found[1] - np.hypot(0.4, 30.0)) < 1e-9
    assert misfits(residual, use, 31.0 / MISFIT[0]) == []
    residual[use, :, 0] = 31.0 / MISFIT[1]
    assert misfits(residual, use, 6.0) == []
