"""Radiation damage: the exposure filter of Grant & Grigorieff 2015 (eLife 4:e06980), convention 14."""

from __future__ import annotations

import torch
from torch import Tensor

# critical dose Nc(k) = A·k^B + C in e/Å² at 300 kV (eq. 3 of the paper)
CRITICAL_DOSE_A = 0.245
CRITICAL_DOSE_B = -1.665
CRITICAL_DOSE_C = 2.81
FACTOR_200_KV = 0.8
LOWEST_FREQUENCY = 1e-6  # 1/Å; k^-1.665 has a pole at zero, where nothing is ever damaged


def critical_dose(frequency: Tensor, voltage: float) -> Tensor:
    """Dose (e/Å²) at which the signal at `frequency` (1/Å) has fallen to 1/e in power.

    The paper measured 300 kV and scales by 0.8 for 200 kV; other voltages are interpolated between the two.
    """
    scale = FACTOR_200_KV + (1 - FACTOR_200_KV) * min(max((voltage - 200.0) / 100.0, 0.0), 1.0)
    k = frequency.clamp_min(LOWEST_FREQUENCY)
    return scale * (CRITICAL_DOSE_A * k**CRITICAL_DOSE_B + CRITICAL_DOSE_C)


def exposure_filter(frequency: Tensor, dose: Tensor, voltage: float) -> Tensor:
    """Amplitude left after `dose` (e/Å², at the *end* of the exposure): exp(-dose / (2·Nc(k))). Arguments broadcast."""
    return torch.exp(-dose / (2 * critical_dose(frequency, voltage)))
