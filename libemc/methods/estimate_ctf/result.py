"""What an estimate of the CTF shows beside its numbers: the rings, what was fitted to them, and how well else it would fit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Rings:
    """The power spectra of T tilts by direction and frequency, all of a tilt's tiles brought to the defocus of the image centre.

    Attributes:
        k: (K,) 1/Å, centres of the rings, rising.
        angle: (S,) degrees from +x, counter-clockwise, centres of equal sectors of the half circle.
        measured: (T, S, K) power over its smooth background, about 1; NaN where nothing was measured.
        fitted: (T, S, K) the model of the same.
        error: (T, S, K) standard error of `measured`.
        defocus: (Z,) Å, rising.
        score: (T, Z) log-likelihood of each mean defocus of a tilt, its maximum 0.
    """

    k: NDArray[np.float64]
    angle: NDArray[np.float64]
    measured: NDArray[np.float32]
    fitted: NDArray[np.float32]
    error: NDArray[np.float32]
    defocus: NDArray[np.float64]
    score: NDArray[np.float64]
