"""ctf: frequencies of equal phase. The function itself is held by test_conventions."""

from __future__ import annotations

import numpy as np
import torch

from libemc.numerics import ctf as model
from libemc.numerics.ctf import Optics

OPTICS = Optics(300.0, 2.7, 0.07)


def test_equal_phase_is_equal_phase() -> None:
    """By the phase aberration of `numerics`, spherical aberration included; none where no frequency has that phase."""
    k = np.linspace(0.01, 0.3, 50)
    there = model.equal_phase(k, 30000.0, 21000.0, OPTICS)
    a, b = (
        model.phase_aberration(torch.from_numpy(x), torch.zeros(50), *(torch.tensor(v) for v in (z, z, 0.0, 0.0)), OPTICS)
        for x, z in ((k, 30000.0), (there, 21000.0))
    )  # fmt: skip
    np.testing.assert_allclose(b.numpy(), a.numpy(), rtol=1e-9)
    assert np.isnan(model.equal_phase(np.array([0.3]), 30000.0, 3000.0, OPTICS)).all()
