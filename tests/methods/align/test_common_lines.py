"""The tilt axis of lone objects."""

from __future__ import annotations

import numpy as np
import pytest

from libemc.methods.align import common_lines
from tests.methods.align.lone_object import lone_object


@pytest.mark.parametrize("axis", [-88.0, -31.0, 3.0, 52.0])
def test_lines_agree_along_the_axis(axis):
    images = lone_object(axis, np.linspace(-60, 60, 41))
    axes = np.arange(-90.0, 90.0, 2.0)
    scores = common_lines.agreement(images, axes.tolist()).numpy()
    found = axes[scores.argmax()]
    assert abs((found - axis + 90) % 180 - 90) <= 2.0  # a step of the search
    assert scores.max() > scores.min() + 0.1
