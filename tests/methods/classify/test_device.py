"""Axes and coordinates on a GPU: the same as on the CPU; and where there is none, nothing that two devices would refuse."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from libemc.methods.classify.axes import Problem, find, known_axes, measured, spectrum
from libemc.methods.classify.coordinates import coordinates
from libemc.methods.classify.differences import Differences
from libemc.methods.classify.frame import Frame
from tests.methods.classify_data import PIXEL, ball_mask, drawn, on_cube
from tests.other_device import other_device

PARTICLE = [(1.0, (10.0, 0.0, -5.0), 14.0), (1.4, (-12.0, 8.0, 4.0), 12.0), (0.8, (3.0, -16.0, 12.0), 9.0)]


@dataclass(frozen=True)
class Found:
    balls: torch.Tensor
    strength: torch.Tensor
    noise: torch.Tensor
    b: torch.Tensor
    singular: torch.Tensor


@pytest.fixture(scope="module")
def data() -> Differences:
    """Particles that differ along two axes."""
    frame = Frame.of(16, PIXEL, 5 * PIXEL)
    g = torch.Generator().manual_seed(1)
    columns = 0.5 * torch.randn(2, frame.points.shape[1], dtype=torch.complex64, generator=g)
    return drawn(frame, columns, torch.randn(40, 2, generator=g), 1)


def found_on(device: str, data: Differences) -> Found:
    """Everything that `--device` is for."""
    frame = data.frame
    known = known_axes(frame, on_cube(PARTICLE, frame))
    problem = Problem(data, slice(0, frame.points.shape[1]), ball_mask(frame, 32.0), known, device=device)
    problem, axes = measured(problem, 4, torch.Generator().manual_seed(1))
    noise = spectrum(problem, axes, torch.Generator().manual_seed(2)).noise
    places = coordinates(data.blocks(problem.band, device), axes, known, problem.variance, device)
    plain = find(replace(problem, known=None), 4, torch.Generator().manual_seed(1), em=False)
    return Found(axes.balls, axes.strength, noise, places.b, plain.singular)


def test_no_tensors_of_two_devices_meet(data: Differences) -> None:
    on_cpu = found_on("cpu", data)
    with other_device() as name:
        elsewhere = found_on(name, data)
    for part, same in vars(on_cpu).items():
        assert torch.equal(getattr(elsewhere, part), same), part


def test_a_device_that_is_not_there_refuses_what_a_gpu_refuses() -> None:
    """And gives what a GPU gives: else the test above would see nothing."""
    with other_device() as name:
        a, b = torch.arange(3.0).to(name), torch.arange(3.0)
        assert (
            a.device.type == name != b.device.type
            and (2 * a).device.type == torch.zeros(2, device=name).device.type == name
        )
        assert (
            a[torch.tensor([2])].cpu().tolist() == [2.0] and b.to(a).device == a.device and a.cpu().device.type == "cpu"
        )
        for wrong in (lambda: a + b, lambda: b @ a, lambda: b[a.long()], lambda: torch.cat([a, b])):
            with pytest.raises(RuntimeError, match="two devices"):
                wrong()
        with pytest.raises(RuntimeError, match="two devices"):
            a[:1] = b[:1]
        with pytest.raises(TypeError):
            a.numpy()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_the_same_subspace_on_a_gpu(data: Differences) -> None:
    """Principal angles below 1 degree between the planes of the two axes that there are."""
    cpu, gpu = (found_on(name, data).balls[:2] for name in ("cpu", "cuda"))
    a, b = (torch.linalg.qr(torch.view_as_real(m.contiguous()).flatten(1).double().T)[0] for m in (cpu, gpu))
    assert float(torch.linalg.svdvals(a.T @ b).min()) > 0.99985
