"""Which images of a tilt series are worth a look, judged one by one and against each other before anything is aligned: not
finite, blank, dark, or a copy of another. What can only be seen by aligning is left to `coarse`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

LEAST_SIGNAL = 1e-6  # spread of an image over its mean, below which it is blank
DARK = 0.2  # of the mean that its neighbours in tilt have
DARK_SPREAD = 0.5  # of their spread: a dark image of a bright object has little of both
NEIGHBOURS = 6  # images of nearest tilt that an image's brightness is compared with
COPY = 0.98  # correlation of the finest detail of two images, noise included, of which one is a copy
COPY_REFERENCE = 0.6  # and above which neighbours are so free of noise that only identity proves a copy


def is_blank(image: Tensor) -> bool:
    """Whether an image shows nothing or holds values that are not finite."""
    return not bool(image.double().std() > LEAST_SIGNAL * image.double().abs().mean())


def dark_images(images: Sequence[Tensor | None], tilt: Sequence[float]) -> list[int]:
    """Images far darker than their neighbours in tilt, by mean and by spread.

    Args:
        images: (rows, columns) each, as recorded; None where there is none to look at.
        tilt: degrees.
    """
    known = [j for j, image in enumerate(images) if image is not None]
    floor = min((float(images[j].quantile(0.01)) for j in known), default=0.0)  # type: ignore[union-attr]
    zero = floor if floor < 0 else 0.0  # signed counts have their zero anywhere
    mean = {j: float(images[j].mean()) - zero for j in known}  # type: ignore[union-attr]
    spread = {j: float(images[j].std()) for j in known}  # type: ignore[union-attr]
    out = []
    for j in known:
        near = sorted((i for i in known if i != j), key=lambda i: abs(tilt[i] - tilt[j]))[:NEIGHBOURS]
        if len(near) < 2:
            continue
        usual = float(np.median([mean[i] for i in near]))
        if mean[j] < DARK * usual and spread[j] < DARK_SPREAD * float(np.median([spread[i] for i in near])):
            out.append(j)
    return out


def copies(images: Sequence[Tensor | None]) -> list[tuple[int, int]]:
    """Pairs of images, earlier first, whose finest detail is the same, noise included.

    Args:
        images: (rows, columns) each, as recorded, up to a factor and a constant; None where there is none to look at.
    """
    known = [j for j, image in enumerate(images) if image is not None]
    if len(known) < 2:
        return []
    stack = torch.stack([images[j] for j in known])  # type: ignore[misc]
    detail = (stack[:, 1:, 1:] - stack[:, :-1, 1:] - stack[:, 1:, :-1] + stack[:, :-1, :-1]).flatten(1)
    detail = torch.nn.functional.normalize(detail - detail.mean(1, keepdim=True), dim=1)
    alike = (detail @ detail.T).numpy()
    usual = float(np.median(np.diagonal(alike, 1)))
    limit = COPY if usual < COPY_REFERENCE else 1 - 1e-5
    return [(known[a], known[b]) for a in range(len(known)) for b in range(a + 1, len(known)) if alike[a, b] > limit]
