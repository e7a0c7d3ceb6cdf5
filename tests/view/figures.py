"""What pages draw, kept to be looked at."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from libemc.view import plots


def kept_figures(monkeypatch: pytest.MonkeyPatch, module: ModuleType, contrast: float) -> list[Figure]:
    """The figures that a module writes from now on, each of them also as a file with something in it.

    Args:
        contrast: least standard deviation of a picture's pixels.
    """
    kept: list[Figure] = []

    def save(figure: Figure, path: Path) -> None:
        plots.save(figure, path)
        shown = imread(path)[..., :3]
        assert min(shown.shape[:2]) > 150 and shown.std() > contrast
        kept.append(figure)

    monkeypatch.setattr(module, "save", save)
    return kept
