"""Agreement of the models of seeds."""

from __future__ import annotations

import torch

from libemc.methods.initial_model.consensus import agreement, likeness
from tests.methods.subtilt_data import blobs


def test_agreement_of_sets_of_classes() -> None:
    """Classes in another order are the same set; the table is symmetric, with ones on its diagonal."""
    a, b, c = (blobs(24, seed) for seed in (1, 2, 3))
    first, swapped, other = torch.stack([a, b]), torch.stack([b, a]), torch.stack([a, c])
    assert likeness(first, swapped, 7.0, 2.0) > 0.995
    table = agreement([first, swapped, other], 7.0, 2.0)
    assert torch.equal(table, table.T) and table.diagonal().tolist() == [1, 1, 1]
    assert float(table[0, 2]) < float(table[0, 1]) - 0.05
