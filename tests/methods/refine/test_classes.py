"""Refinement in classes: two kinds told apart, likelihoods in closed form, and references without the particle itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from libemc.methods import average
from libemc.methods.refine import classes
from libemc.methods.refine.align import Aligned
from libemc.methods.refine.classes import Class, State, assigned, averaged, divided, iteration, log_likelihood
from libemc.methods.refine.iteration import Setup
from libemc.methods.refine.left_out import FOLDS, References, parts_of
from libemc.methods.refine.limits import Limits
from libemc.methods.refine.polish import pose_terms
from libemc.methods.refine.references import Filtering
from libemc.methods.refine.schedule import Step
from libemc.methods.subtilts import Particles, load_batch, noise_spectrum
from libemc.numerics import slices
from libemc.numerics.masks import soft_sphere
from libemc.numerics.rotations import matrix_from_rotvec, rotation_distance
from libemc.numerics.slices import Band, FourierVolume
from tests.methods.subtilt_data import blobs, particle_set

MEMORY, PIXEL, BOX = 1 << 28, 8.0, 24
NOTHING = References([], {}, 60.0)


def setup(box: int = BOX) -> Setup:
    mask = soft_sphere(box, 0.4 * box, 3.0)
    filtering = Filtering("spherical", mask, PIXEL, 0)
    return Setup(mask, mask, filtering, Limits(2.0), "c1", box * PIXEL / 60.0, None, False, 0, MEMORY)


def kinds(box: int = BOX) -> tuple[torch.Tensor, torch.Tensor]:
    """A particle with a lump more, on one side or on another."""
    x = (torch.arange(box) - box // 2).float()
    lumps = []
    for centre in ((5.0, 2.0, -3.0), (-4.0, -4.0, 3.0)):
        line = [torch.exp(-0.5 * ((x - c) / 1.8) ** 2) for c in centre]
        lumps.append(blobs(box) + 1.2 * torch.einsum("z,y,x->zyx", *line))
    return lumps[0], lumps[1]


def mixed(counts: tuple[int, int], noise: float = 2.0) -> tuple[Particles, torch.Tensor]:
    """One tilt series of both kinds, shuffled by turns as its file goes: particles, and which kind each is (N,) from 0."""
    first, second = (particle_set(m, sum(counts), PIXEL, noise, seed=1) for m in kinds())
    count, tilts = sum(counts), len(first.series.use)
    kind = torch.zeros(count, dtype=torch.long)
    kind[torch.randperm(count, generator=torch.Generator().manual_seed(5))[: counts[1]]] = 1
    other = np.repeat(kind.numpy() == 1, tilts)
    return replace(first, stack=np.where(other[:, None, None], second.stack, first.stack)), kind


def disturbed(particles: Particles, degrees: float, shift: float) -> Particles:
    g = torch.Generator().manual_seed(8)
    turn = degrees * torch.randn(len(particles), 3, generator=g).double()
    moved = particles.xyz + shift * torch.randn(len(particles), 3, generator=g).double()
    return particles.moved(matrix_from_rotvec(turn) @ particles.rotation, moved, particles.score)


def begun(particles: Particles, probability: torch.Tensor, numbers: tuple[int, ...] = (1, 2)) -> State:
    return State([Class(k, [particles], NOTHING) for k in numbers], [probability])


def one_hot(labels: torch.Tensor, count: int = 2) -> torch.Tensor:
    return torch.nn.functional.one_hot(labels, count).double()


def wrong(labels: torch.Tensor, part: float) -> torch.Tensor:
    """Labels from 0 to 1, a part of them the other."""
    some = torch.randperm(len(labels), generator=torch.Generator().manual_seed(2))[: round(part * len(labels))]
    out = labels.clone()
    out[some] = 1 - out[some]
    return out


@pytest.fixture(scope="module")
def two() -> tuple[Particles, Particles, torch.Tensor]:
    """The truth, the same with poses off by 3° and 2 Å, and the kinds: 40 and 24 particles."""
    particles, kind = mixed((40, 24))
    return particles, disturbed(particles, 3.0, 2.0), kind


@pytest.fixture(scope="module")
def sorted_(two: tuple[Particles, Particles, torch.Tensor]) -> list[State]:
    """The classes of 30 % of which are the other one's, before and after two iterations."""
    _, start, kind = two
    states = [averaged(begun(start, one_hot(wrong(kind, 0.3))), setup())]
    for _ in range(2):
        states.append(iteration(states[-1], [start], Step(40.0, exhaustive=False), setup()))
    return states


# -------------------------------------------------------------------------------------------------------- iterations


def test_kinds_are_told_apart(two: tuple[Particles, Particles, torch.Tensor], sorted_: list[State]) -> None:
    """30 % of the particles begin in the wrong class; after two iterations one in 20 at most is, and shares are those of 40 and
    24; of the first iteration more has changed than of the second."""
    truth, start, kind = two
    found = sorted_[-1].probability[0].argmax(dim=1)
    assert int((wrong(kind, 0.3) != kind).sum()) == round(0.3 * len(kind))
    assert int((found != kind).sum()) <= len(kind) // 20
    assert sorted_[-1].shares() == pytest.approx([40 / 64, 24 / 64], abs=0.06)
    assert 0.15 < sorted_[1].changed < 0.4 and sorted_[2].changed < sorted_[1].changed / 2
    assert sorted_[-1].numbers == [1, 2]
    off = [rotation_distance(p.rotation, truth.rotation).median() for p in (sorted_[-1].best()[0], start)]
    assert off[0] < 0.6 * off[1]  # poses are refined along with it


def test_classes_of_nothing_come_to_be_the_same() -> None:
    """Particles that differ by noise alone, divided at random: after four iterations each is in every class as much as the class
    is large, to a hundredth. A difference that the halves shared at low resolution would leave three times that."""
    particles, _ = mixed((64, 0), 4.0)
    start = disturbed(particles, 2.0, 1.5)
    label = (torch.rand(64, generator=torch.Generator().manual_seed(3)) < 0.35).long()
    state = averaged(begun(start, one_hot(label)), setup())
    assert state.certainty == 1
    for _ in range(4):
        state = iteration(state, [start], Step(40.0, exhaustive=False), setup())
    assert float((state.probability[0] - torch.tensor(state.shares())).abs().max()) < 0.01
    assert state.certainty < 1e-3


def test_certainty_in_closed_form() -> None:
    """Half of the particles for certain in a class of two equal ones, of the others nothing is known: half of a bit each."""
    particles, _ = mixed((8, 0))
    share = torch.tensor([[1.0, 0.0]] * 2 + [[0.0, 1.0]] * 2 + [[0.5, 0.5]] * 4).double()
    assert begun(particles, share).certainty == pytest.approx(0.5)
    assert begun(particles, torch.ones(8, 1).double(), (1,)).certainty == 1


def test_maps_are_those_of_the_kinds(sorted_: list[State]) -> None:
    """Each class's average is its own kind's more than the other's, where they differ."""
    a, b = kinds()
    first, second = (c.made.average for c in sorted_[-1].classes if c.made is not None)
    mask = setup().mask
    difference, true = ((first - second) * mask).flatten(), ((a - b) * mask).flatten()
    assert float(difference @ true / difference.norm() / true.norm()) > 0.7


def test_shares_count_particles_with_weight(two: tuple[Particles, Particles, torch.Tensor]) -> None:
    _, start, kind = two
    use = torch.arange(len(kind)) % 3 != 0
    state = begun(start.using(use), one_hot(kind))
    assert state.shares() == pytest.approx([float((kind[use] == k).double().mean()) for k in (0, 1)])


def test_averages_are_weighed_by_probabilities(two: tuple[Particles, Particles, torch.Tensor]) -> None:
    """Soft shares are weights; below a thousandth a particle is no part at all."""
    _, start, kind = two
    g = torch.Generator().manual_seed(3)
    p = torch.rand(len(kind), 1, generator=g, dtype=torch.float64)
    p[:10] = 5e-4
    state = averaged(begun(start, torch.cat([p, 1 - p], dim=1)), setup())
    weight = torch.where(p[:, 0] > 1e-3, start.weight * p[:, 0], 0.0)
    wanted = average.half_maps([replace(start, weight=weight)], MEMORY)
    found = state.classes[0].maps
    assert found is not None
    torch.testing.assert_close(found.half1, wanted.half1, rtol=1e-5, atol=1e-6 * float(wanted.half1.abs().max()))
    torch.testing.assert_close(state.classes[0].series[0].weight, start.weight)  # the particles keep their own


def test_a_class_that_nobody_is_in_is_given_up(two: tuple[Particles, Particles, torch.Tensor]) -> None:
    """Of three, the middle one with two particles: what is left keeps its numbers and its shares, and its rows sum to 1."""
    _, start, kind = two
    labels = kind * 2
    labels[:2] = 1
    state = averaged(begun(start, 0.5 * one_hot(labels, 3) + 0.5 / 3, (1, 2, 3)), setup())
    assert state.numbers == [1, 2, 3]  # a sixth of all is more than a few
    state = averaged(begun(start, one_hot(labels, 3), (1, 2, 3)), setup())
    assert state.numbers == [1, 3] and state.probability[0].shape == (len(kind), 2)
    sure = state.probability[0][2:]
    torch.testing.assert_close(sure, one_hot(kind)[2:])
    assert bool(torch.isfinite(state.probability[0]).all())
    out = iteration(state, [start], Step(40.0, exhaustive=False), setup())
    (best,) = out.best()
    assert out.numbers == [1, 3] and {q.class_ for q in best.file.particles} <= {1, 3}
    assert all(q.classes is not None and len(q.classes) == 3 and q.classes[1] == 0 for q in best.file.particles)


def test_particles_of_a_class_given_up_are_in_the_others(two: tuple[Particles, Particles, torch.Tensor]) -> None:
    _, start, kind = two
    labels = kind * 2
    labels[:2] = 1
    state = averaged(begun(start, one_hot(labels, 3), (1, 2, 3)), setup())
    torch.testing.assert_close(state.probability[0].sum(dim=1), torch.ones(len(kind)).double())


def test_a_set_that_is_too_small_keeps_its_classes(two: tuple[Particles, Particles, torch.Tensor]) -> None:
    """Two particles of each class in each half."""
    _, start, kind = two
    use = torch.zeros(len(kind), dtype=torch.bool)
    for k in (0, 1):
        for half in (1, 2):
            use[torch.nonzero((kind == k) & (start.half == half))[:2, 0]] = True
    assert int(use.sum()) == 8
    assert averaged(begun(start.using(use), one_hot(kind)), setup()).numbers == [1, 2]


# -------------------------------------------------------------------------------------- nobody is compared with itself


@dataclass(frozen=True)
class Unfiltered:
    """In the place of `Filtering`: maps as they are. A filter by what the halves agree on would take the spike off all."""

    mask: torch.Tensor

    def of(self, *_: Any) -> Any:
        return lambda density, _gain: density


def test_no_particle_is_compared_with_a_reference_that_holds_it(two: tuple[Particles, Particles, torch.Tensor]) -> None:
    """One particle's images hold a spike of a thousand times the rest's deviation. The references of its half hold it, those of
    the other class too, since they share what is common; those that it is compared with and those of the other half don't."""
    _, start, kind = two
    spike, tilts = 7, len(start.series.use)
    stack = start.stack.astype(np.float32)
    stack[spike * tilts : (spike + 1) * tilts, BOX // 2, BOX // 2] += 1000 * stack.std()
    part, half = int(parts_of([start])["TS_01"][spike]), int(start.half[spike]) - 1
    plain = replace(setup(), filtering=Unfiltered(torch.ones(BOX, BOX, BOX)), shared=0.0)  # type: ignore[arg-type]
    peaks = []
    for s in (stack, start.stack):
        state = averaged(begun(replace(start, stack=s), one_hot(kind)), plain)
        pairs = [c.references.maps for c in state.classes if isinstance(c.references, References)]
        peaks.append(torch.tensor([[[float(m.abs().max()) for m in pair] for pair in maps] for maps in pairs]))
    ratio = peaks[0] / peaks[1]  # (class, part, half)
    wanted = torch.zeros(2, FOLDS, 2, dtype=torch.bool)
    wanted[:, :, half] = True
    wanted[:, part, half] = False
    assert float(ratio[wanted].min()) > 2 and float(ratio[~wanted].max()) < 1.15, ratio


@pytest.mark.parametrize(("noise", "wrong_at_most"), [(4.0, 2), (6.0, 16)])
def test_a_small_class_is_not_swallowed(noise: float, wrong_at_most: int) -> None:
    """Of 48 and 16 particles, from the true classes: with the true maps the images themselves leave 1 and 6 wrong. With averages
    of the classes by themselves, of which the larger holds more signal, 5 were, and one class alone was left."""
    particles, kind = mixed((48, 16), noise)
    start = disturbed(particles, 2.0, 1.5)
    state = averaged(begun(start, one_hot(kind)), setup())
    for _ in range(3):
        state = iteration(state, [start], Step(40.0, exhaustive=False), setup())
    assert state.numbers == [1, 2] and 0.15 < state.shares()[1] < 0.42
    assert int((state.probability[0].argmax(dim=1) != kind).sum()) <= wrong_at_most


# ------------------------------------------------------------------------------------------------------- likelihoods


def test_log_likelihood_is_that_of_the_images() -> None:
    """|y|² - |y - a m|² of every particle's images, written out, with one contrast a: the difference between two references at
    the same poses is what it says, and so is each."""
    density = kinds()
    particles, kind = mixed((8, 6), noise=1.0)
    band = Band.of(BOX, 5.0)
    batch = load_batch(particles, torch.arange(14), band, noise_spectrum(particles, band))
    shift = torch.zeros(14, 3, dtype=torch.float64)
    aligned, terms, written = [], [], []
    for m in density:
        volume = FourierVolume.from_map(m, radius=band.radius)
        t = pose_terms(batch, volume, particles.rotation, shift)
        terms.append(t)
        aligned.append(Aligned([particles], [t.cross / t.norm], [(2 * t.norm).rsqrt()], []))
    before = one_hot(kind)
    contrast = torch.stack([x.contrast[0] for x in aligned], dim=1)
    a = float(contrast[torch.arange(14), kind].median())  # of a typical particle in its class
    for m in density:
        volume = FourierVolume.from_map(m, radius=band.radius)
        cut = slices.extract_slices(volume, batch.matrices(), band, batch.magnification)
        # images are kept times their CTF: 2 a Re⟨y, ctf·slice⟩ - a² |ctf·slice|²
        gain = 2 * a * (batch.centred().conj() * cut).real - a**2 * (batch.transfer**2 * cut.abs() ** 2)
        written.append(torch.zeros(14).double().index_add(0, batch.owner, gain.double().sum(dim=1)))
    (found,) = log_likelihood(aligned, [before])
    wanted = torch.stack(written, dim=1)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    closed = torch.stack([2 * a * t.cross - a**2 * t.norm for t in terms], dim=1)
    torch.testing.assert_close(found, closed, rtol=1e-6, atol=1e-6 * float(closed.abs().max()))
    assert float((found.argmax(dim=1) == kind).double().mean()) > 0.9


def test_what_no_image_shows_is_as_likely_in_all() -> None:
    particles, _ = mixed((4, 3))
    c = torch.tensor(
        [[1.0, 0.5], [float("nan"), float("nan")], [0.9, 1.2], [-0.1, 0.2], [1.1, 0.4], [1.0, 1.0], [0.8, 0.9]]
    ).double()
    aligned = [Aligned([particles], [c[:, k]], [torch.full((7,), 0.1).double()], []) for k in (0, 1)]
    (found,) = log_likelihood(aligned, [one_hot(torch.zeros(7, dtype=torch.long))])
    assert found[1].tolist() == [0.0, 0.0] and bool(torch.isfinite(found).all())
    typical = float(np.median([1.0, 0.9, 1.1, 1.0, 0.8]))  # those with some contrast in their class
    torch.testing.assert_close(found[2], 50 * typical * (2 * c[2] - typical))


def test_assigned_is_bayes_rule() -> None:
    """Of likelihoods and of how large classes were over all tilt series, written out."""
    g = torch.Generator().manual_seed(1)
    likelihood = [3 * torch.randn(n, 3, generator=g, dtype=torch.float64) for n in (5, 4)]
    before = [torch.rand(n, 3, generator=g, dtype=torch.float64) for n in (5, 4)]
    before = [b / b.sum(dim=1, keepdim=True) for b in before]
    share = np.concatenate(before).mean(axis=0)
    for found, logs in zip(assigned(likelihood, before), likelihood, strict=True):
        joint = np.exp(logs.numpy()) * share
        np.testing.assert_allclose(found, joint / joint.sum(axis=1, keepdims=True), rtol=1e-9)
    # shares of 9 to 1 alone are prior odds of 9; very large likelihoods do no harm
    (alone,) = assigned([torch.zeros(10, 2).double()], [one_hot((torch.arange(10) == 0).long())])
    torch.testing.assert_close(alone[3], torch.tensor([0.9, 0.1]).double())
    (sure,) = assigned([torch.tensor([[1e5, 0.0], [0.0, 1e5]]).double()], [torch.full((2, 2), 0.5).double()])
    torch.testing.assert_close(sure, torch.eye(2).double())


# --------------------------------------------------------------------------------------------------------- in files


def test_probabilities_survive_a_file(sorted_: list[State]) -> None:
    """As four digits; the class is the likeliest one, the pose is that in it."""
    state = sorted_[-1]
    (best,) = state.best()
    again = Particles.of(best.to_file(), best.stack)
    (found,) = divided([again], state.numbers)
    torch.testing.assert_close(found, state.probability[0], rtol=0, atol=1.1e-4)
    which = state.probability[0].argmax(dim=1)
    assert [q.class_ for q in again.file.particles] == (which + 1).tolist()
    poses = torch.stack([c.series[0].rotation for c in state.classes])[which, torch.arange(len(which))]
    assert float(rotation_distance(again.rotation, poses).max()) < 1e-4
    apart = rotation_distance(state.classes[0].series[0].rotation, state.classes[1].series[0].rotation)
    assert float(apart.max()) > 0.1  # so that it matters in which class


def test_divided_without_probabilities_is_by_the_class(two: tuple[Particles, Particles, torch.Tensor]) -> None:
    """1 for the class that a particle is in; even for those that are in none of them."""
    _, start, kind = two
    labels = (kind + 1).tolist()
    labels[4] = 0
    file = start.file.model_copy(
        update={
            "particles": tuple(
                q.model_copy(update={"class_": k}) for q, k in zip(start.file.particles, labels, strict=True)
            )
        }
    )
    (found,) = divided([replace(start, file=file)], [1, 2])
    wanted = one_hot(kind)
    wanted[4] = 0.5
    torch.testing.assert_close(found, wanted)
    # probabilities of three classes, of which the second was given up
    some = [q.model_copy(update={"classes": (0.2, 0.0, 0.6)}) for q in file.particles]
    (left,) = divided([replace(start, file=file.model_copy(update={"particles": tuple(some)}))], [1, 3])
    torch.testing.assert_close(left[0], torch.tensor([0.25, 0.75]).double())


def test_states_begin_with_everybody_changed() -> None:
    particles, kind = mixed((4, 3))
    state = begun(particles, one_hot(kind))
    assert state.changed == 1.0 and classes.SETTLED < 1
